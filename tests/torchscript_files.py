"""TorchScript files written by hand, without torch: as small or as odd as a test needs them."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterable, Mapping

FLOATS = "torch.FloatStorage"


def write(value: object) -> bytes:
    """A value as torch pickles it, without a memo: see the classes below for what is no value."""
    if isinstance(value, Odd):
        return value.write()
    match value:
        case None:
            return b"N"
        case True:
            return b"\x88"
        case False:
            return b"\x89"
        case int():
            return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            return b"(" + b"".join(map(write, value)) + b"t"
        case list():
            return b"](" + b"".join(map(write, value)) + b"e"
        case dict():
            items = b"".join(write(key) + write(each) for key, each in value.items())
            return b"}(" + items + b"u"
    raise TypeError(value)


def pickle(value: object) -> bytes:
    return b"\x80\x02" + write(value) + b"."


class Odd:
    def write(self) -> bytes:
        raise NotImplementedError


class Raw(Odd):
    """These bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def write(self) -> bytes:
        return self.data


class Name(Odd):
    def __init__(self, name: str) -> None:
        self.name = name

    def write(self) -> bytes:
        module, _, name = self.name.rpartition(".")
        return f"c{module}\n{name}\n".encode()


class Made(Odd):
    """A call."""

    def __init__(self, name: str, argument: object) -> None:
        self.name, self.argument = name, argument

    def write(self) -> bytes:
        return Name(self.name).write() + write(self.argument) + b"R"


class Thing(Odd):
    """An object of the file's own class; a module if its code says so."""

    def __init__(self, cls: str, **state: object) -> None:
        self.cls, self.state = cls, state

    def write(self) -> bytes:
        return Name(self.cls).write() + b")\x81" + write(self.state) + b"b"


class Tensor(Odd):
    def __init__(
        self, key: str, count: int, shape: tuple[int, ...] | None = None,
        stride: tuple[int, ...] = (1,), start: int = 0, kind: str = FLOATS, device: str = "cpu",
        grad: bool = False,
    ) -> None:  # fmt: skip
        self.storage = ("storage", Name(kind), key, device, count)
        self.rest = (start, (count,) if shape is None else shape, stride, grad)

    def write(self) -> bytes:
        hooks = Made("collections.OrderedDict", ())
        inner = b"(" + b"".join(map(write, self.storage)) + b"tQ"
        return (
            Name("torch._utils._rebuild_tensor_v2").write()
            + b"("
            + inner
            + b"".join(map(write, (*self.rest, hooks)))
            + b"tR"
        )


def module(name: str = "M", attributes: Iterable[str] = (), body: str = "") -> str:
    """A class as torch prints it, with a forward method."""
    declared = "".join(f"  {attribute}\n" for attribute in attributes)
    body = body or "    return x\n"
    return (
        f"class {name}(Module):\n{declared}  def forward(self,\n    x: Tensor) -> Tensor:\n{body}"
    )


def archive(entries: Mapping[str, bytes], root: str = "m") -> bytes:
    """A zip, the same whenever it is made."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        for name, data in entries.items():
            packed = zipfile.ZIP_DEFLATED if name.startswith("code/") else zipfile.ZIP_STORED
            target.writestr(zipfile.ZipInfo(f"{root}/{name}"), data, packed)
    return buffer.getvalue()


def entries(
    root: Odd,
    storages: Mapping[str, bytes],
    code: Mapping[str, str],
    constants: object = (),
    **more: bytes,
) -> dict[str, bytes]:
    """The members of a file; `code` by module, e.g. `__torch__`."""
    return {
        **{f"data/{key}": data for key, data in storages.items()},
        "data.pkl": pickle(root),
        **{f"code/{name.replace('.', '/')}.py": text.encode() for name, text in code.items()},
        "constants.pkl": pickle(constants),
        "version": b"3\n",
        "byteorder": b"little",
        **more,
    }


def weights(root: str = "m", **tensors: bytes) -> bytes:
    """A file whose root module has these tensors of floats, and does nothing."""
    attributes = {name: Tensor(name, len(data) // 4) for name, data in tensors.items()}
    code = {"__torch__": module(attributes=[f"{name} : Tensor" for name in tensors])}
    return archive(entries(Thing("__torch__.M", **attributes), tensors, code), root)
