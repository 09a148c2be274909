"""Walks the object graph of a module: its tensors in canonical order, and the graph itself as
bytes that are equal for equal graphs."""

from __future__ import annotations

import struct
from typing import Final

from shared.layout.code import Canon, Definition
from shared.layout.model import Slot
from shared.layout.pickled import Call, Global, Instance, Persistent, Table
from shared.layout.records import Unreadable

MAX_DEPTH: Final = 100
"""Of modules in modules."""
MAX_WRITTEN: Final = 16 << 20
"""Bytes that a graph and its slots may take, written out. A pickle can name a thing a million
times; BERT-base needs some 40,000."""
DTYPES: Final = {
    "DoubleStorage": ("float64", 8), "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1), "UInt16Storage": ("uint16", 2), "UInt32Storage": ("uint32", 4),
    "UInt64Storage": ("uint64", 8), "ComplexHalfStorage": ("complex32", 4),
    "ComplexFloatStorage": ("complex64", 8), "ComplexDoubleStorage": ("complex128", 16),
    "Float8_e4m3fnStorage": ("float8_e4m3fn", 1), "Float8_e5m2Storage": ("float8_e5m2", 1),
    "Float8_e4m3fnuzStorage": ("float8_e4m3fnuz", 1),
    "Float8_e5m2fnuzStorage": ("float8_e5m2fnuz", 1),
}  # fmt: skip
"""torch's name and size of an element, by the name of its storage in a pickle."""

_TENSOR: Final = "torch._utils._rebuild_tensor_v2"
_VALUES: Final = frozenset({
    "builtins.complex", "torch.device", "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_doublelist", "torch.jit._pickle.build_intlist",
    "torch.jit._pickle.build_tensorlist", "torch.jit._pickle.restore_type_tag",
})  # fmt: skip
"""Calls that make a plain value of their arguments."""

_DOUBLE: Final = struct.Struct("<d")
_Path = tuple[str, ...]


class Walk:
    """Walks one pickle. `module`: the root is a module, whose tensors are its attributes;
    otherwise a tuple of constants."""

    def __init__(
        self, known: dict[str, Definition], canon: Canon, *, module: bool, grads: bool
    ) -> None:
        self._known = known
        self._canon = canon
        self._module = module
        self._grads = grads
        """Whether the code asks which tensors require gradients."""
        self._seen: dict[int, int] = {}
        self._texts: dict[str, int] = {}
        self._storages: dict[str, int] = {}
        self._stack: list[tuple[object, _Path | None]] = []
        """What is to be visited, with its path if it is an attribute of a module."""
        self._dump: list[bytes] = []
        self._written = 0
        self.slots: list[Slot] = []
        self.sizes: list[int] = []
        """Bytes of each storage, in the order in which they are met."""

    @property
    def keys(self) -> list[str]:
        """Of the storages, in the same order."""
        return list(self._storages)

    def run(self, root: object) -> bytes:
        """The graph as bytes. Raises `Unreadable` when it is not fully understood."""
        if self._module and not (isinstance(root, Instance) and self._is_module(root.cls)):
            raise Unreadable("its root is not a module")
        self._stack.append((root, ()))
        while self._stack:
            value, path = self._stack.pop()
            self._visit(value, path)
        return b"".join(self._dump)

    def _visit(self, value: object, path: _Path | None) -> None:
        if isinstance(value, str):
            self._text(b"s", value)
            return
        if value is None or isinstance(value, bool | int | float):
            self._write(_scalar(value))
            return
        tensor = isinstance(value, Call) and value.name == _TENSOR
        if tensor and path is None and self._module:
            raise Unreadable("it has a tensor in a list, dict, tuple or object")
        number = self._seen.get(id(value))
        if number is not None and value != ():
            self._write(b"@%d;" % number)
        elif isinstance(value, Call) and tensor:
            self._seen[id(value)] = len(self._seen)
            self._tensor(value)
        else:
            self._seen[id(value)] = len(self._seen)
            self._container(value, path)
        # Another attribute over a tensor that was seen is another slot; a module is visited once.
        if isinstance(value, Call) and tensor and path is not None:
            self._slot(value, path)

    def _container(self, value: object, path: _Path | None) -> None:
        if isinstance(value, Instance):
            self._instance(value, path)
        elif isinstance(value, Call):
            self._call(value)
        elif isinstance(value, tuple | list):
            self._open(b"(" if isinstance(value, tuple) else b"[", value)
        elif isinstance(value, Table):
            self._open(b"{", [each for item in value.items for each in item])
        elif isinstance(value, Global):
            raise Unreadable(f"it holds {value.name[:80]} itself")
        else:
            raise Unreadable("it holds a storage outside of a tensor")

    def _write(self, data: bytes) -> None:
        self._dump.append(data)
        self._spend(len(data))

    def _spend(self, nbytes: int) -> None:
        self._written += nbytes
        if self._written > MAX_WRITTEN:
            raise Unreadable(f"its objects written out would take more than {MAX_WRITTEN:,} bytes")

    def _text(self, mark: bytes, text: str) -> None:
        number = self._texts.get(text)
        if number is not None:
            self._write(b"%s@%d;" % (mark, number))
            return
        self._texts[text] = len(self._texts)
        data = text.encode()
        self._write(b"%s%d;%s" % (mark, len(data), data))

    def _open(self, mark: bytes, children: tuple[object, ...] | list[object]) -> None:
        self._write(b"%s%d;" % (mark, len(children)))
        self._stack.extend((child, None) for child in reversed(children))

    def _is_module(self, cls: str) -> bool:
        definition = self._known.get(cls)
        return definition is not None and definition.kind == "Module"

    def _instance(self, value: Instance, path: _Path | None) -> None:
        definition = self._known.get(value.cls)
        if definition is None:
            raise Unreadable(
                f"it has an object of {value.cls[:80]}, which its code does not define"
            )
        if not self._module:
            raise Unreadable("an object is among its constants")
        if not isinstance(value.state, Table):
            raise Unreadable(f"an object of {value.cls[:80]} has a state of its own kind")
        module = definition.kind == "Module"
        if module and path is None:
            raise Unreadable("it has a module in a list, dict or tuple")
        if path is not None and len(path) > MAX_DEPTH:
            raise Unreadable(f"its modules are nested more than {MAX_DEPTH} deep")
        self._text(b"o", self._canon.name(value.cls))
        self._write(b"%d;" % len(value.state.items))
        names: set[str] = set()
        visits: list[tuple[object, _Path | None]] = []
        for name, child in value.state.items:
            if not isinstance(name, str) or name in names:
                raise Unreadable("an object has an attribute with no name, or twice")
            names.add(name)
            visits += [
                (name, None),
                (child, (*path, name) if module and path is not None else None),
            ]
        self._stack.extend(reversed(visits))

    def _call(self, value: Call) -> None:
        definition = self._known.get(value.name)
        if definition is not None and definition.kind == "Enum":
            self._text(b"e", self._canon.name(value.name))
        elif value.name in _VALUES:
            self._text(b"c", value.name)
        else:
            raise Unreadable(f"it has a value made by {value.name[:80]}")
        self._stack.append((value.argument, None))

    def _tensor(self, value: Call) -> None:
        """Takes note of the storage. Its key and device are no part of the graph: a worker puts
        every tensor where it wants it."""
        key, dtype, nbytes, start, shape, stride, grad = _parse(value)
        storage = self._storages.setdefault(key, len(self._storages))
        if storage == len(self.sizes):
            self.sizes.append(nbytes)
        elif self.sizes[storage] != nbytes:
            raise Unreadable("two of its tensors disagree about the size of their storage")
        grad = grad and self._grads
        view = f"t{storage},{nbytes},{dtype},{start},{shape},{stride},{grad};"
        self._write(view.encode())

    def _slot(self, value: Call, path: _Path) -> None:
        key, dtype, _, start, shape, stride, _ = _parse(value)
        self.slots.append(Slot(path, self._storages[key], dtype, start, shape, stride))
        self._spend(32 + sum(len(name) + 4 for name in path) + 18 * len(shape))


def _parse(value: Call) -> tuple[str, str, int, int, tuple[int, ...], tuple[int, ...], bool]:
    """Storage, dtype, the storage's bytes, start, shape, stride, whether it requires gradients."""
    match value.argument:
        case (
            Persistent(key=("storage", Global(name=kind), str(key), str(device), int(count))),
            int(start),
            tuple(shape),
            tuple(stride),
            bool(grad),
            Call(name="collections.OrderedDict", argument=()),
        ):
            pass
        case _:
            raise Unreadable("it has a tensor with notes of its own (conjugated, negated, hooked)")
    dtype, size = DTYPES.get(kind.removeprefix("torch."), ("", 0))
    if not dtype:
        raise Unreadable(f"it has a tensor of {kind[:80]}")
    if device != "cpu" and not device.startswith("cuda"):
        raise Unreadable(f"it has a tensor on the device {device[:80]!r}")
    if len(shape) != len(stride) or len(shape) > 64 or not 0 <= count < 1 << 50:
        raise Unreadable("it has a tensor that no storage could hold")
    last = start
    for length, step in zip(shape, stride, strict=True):
        if type(length) is not int or type(step) is not int or length < 0 or step < 0:
            raise Unreadable("it has a tensor of an impossible shape")
        last += max(length - 1, 0) * step
    if start < 0 or last >= 1 << 50 or (0 not in shape and last >= count):
        raise Unreadable("it has a tensor that reaches beyond its storage")
    return key, dtype, count * size, start, shape, stride, grad


def _scalar(value: object) -> bytes:
    if isinstance(value, float):
        return b"f" + _DOUBLE.pack(value)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise Unreadable("it has a number of more than 64 bits")
    return f"{value!r};".encode()  # None, True, False, a number
