"""TorchScript programs, brought in without holding the interpreter.

`torch.jit.load` keeps every other thread of Python waiting from its first byte to its last. The
same C++ can be fed from a Python file object, record by record, and then each record is a chance
for others: `_Courteous` gives the interpreter away whenever it was held for a moment. For that a
small archive is made of the program's code and pickles (`torch.package` has such an entry, and
it is the only one that takes a file object). Weights and constants never pass through the
archive: they are storages of ours, and so may be placeholders.

Two things would be wrong without care. In `torch.package`'s archives all storages have one name
space, in TorchScript's the constants have their own: theirs are renamed. And at the end of an
import torch rewrites old quantized convolutions, in all modules that it finds below the root,
while nothing else runs; for a program without any the root is put into a tuple, where it is not
found.
"""

from __future__ import annotations

import io
import shutil
import struct
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Mapping
from pickletools import genops
from typing import Any, Final, NamedTuple

import torch

from services.worker.engine.failures import Failed, diagnose
from services.worker.engine.files import ScatteredFile
from shared.archive import check_torchscript
from shared.errors import InvalidRequest
from shared.layout.records import Record, Records, Unreadable
from shared.names import ModelId

PLAIN_LOADS: Final[Counter[str]] = Counter()
"""How often `torch.jit.load` had to do it, by reason."""
_IMPORTING: Final = threading.Lock()
"""Concurrent imports have corrupted torch's registry of types."""
_MAX_HOLD_S: Final = 0.0003
"""The interpreter is given away at the first record after it was held so long."""
_NAP_S: Final = 0.00005
"""Long enough for a thread that waits to wake up and take it; giving it away for no time at all
gives it to nobody, unless they have waited for a whole switch interval."""
_MAX_CODE_BYTES: Final = 64 << 20
_CONSTANT: Final = "c"
"""Begins the names of the constants' storages."""
_HOLDER: Final = "__torch__.roost_holder"

_PUTS: Final = frozenset({"BINPUT", "LONG_BINPUT"})
_GETS: Final = frozenset({"BINGET", "LONG_BINGET"})

_C: Final[Any] = torch._C  # noqa: SLF001 — private, and typed in part
_NEEDED: Final = (
    "PyTorchFileReader",
    "DeserializationStorageContext",
    "CompilationUnit",
    "_import_ir_module_from_package",
)


class Refused(Exception):
    """The program cannot be imported this way. Perhaps `torch.jit.load` knows how."""


class Parts(NamedTuple):
    """A TorchScript file, taken apart as far as an import needs it."""

    texts: dict[str, bytes]
    """The records that make up the program, by name: code, pickles, versions."""
    weights: dict[str, Record]
    """By the storage's key."""
    constants: dict[str, Record]

    def mentions(self, word: bytes) -> bool:
        """Whether the code has it anywhere."""
        return any(name.endswith(".py") and word in text for name, text in self.texts.items())


def take_apart(file: ScatteredFile) -> Parts:
    """Raises `Failed` (`model_failed`) when the file is not TorchScript, and `Refused` for what
    only torch could read."""
    with file.open() as raw, io.BufferedReader(raw) as opened:
        try:
            records = Records(opened, check_torchscript(opened))
        except InvalidRequest as error:
            raise Failed("model_failed", str(error)) from error
        try:
            return _parts(records)
        except Unreadable as error:
            raise Refused(str(error)) from error


def _parts(records: Records) -> Parts:
    parts = Parts({}, {}, {})
    left = _MAX_CODE_BYTES
    storages = {"data": parts.weights, "constants": parts.constants}
    for name in records.names():
        folder, _, rest = name.partition("/")
        if folder in storages and rest:
            record = storages[folder][rest] = records.find(name)
            if record.packed:
                raise Refused("its tensors are compressed")
        elif _is_text(name):
            parts.texts[name] = records.read(name, left)
            left -= len(parts.texts[name])
    if "model.json" in records or not {"data.pkl", "constants.pkl"} <= parts.texts.keys():
        raise Refused("it is in an old format")
    if parts.texts.get("byteorder", b"little").strip() != b"little":
        raise Refused("it was written on a big-endian machine")
    return parts


def _is_text(name: str) -> bool:
    plain = {"data.pkl", "constants.pkl", "version", ".data/version", "byteorder"}
    return name in plain or (name.startswith("code/") and name.endswith(".py"))


def read_storages(file: ScatteredFile, records: Mapping[str, Record]) -> dict[str, torch.Tensor]:
    """The storages' bytes, on the host. The interpreter is free while they are read."""
    storages: dict[str, torch.Tensor] = {}
    for key, record in records.items():
        storage = storages[key] = torch.empty(record.nbytes, dtype=torch.uint8)
        if record.nbytes:
            file.read_into(record.offset, memoryview(storage.numpy().data))
    return storages


def import_program(
    parts: Parts,
    weights: Mapping[str, torch.Tensor],
    constants: Mapping[str, torch.Tensor],
    device: torch.device | None = None,
) -> Any:
    """The module, as torch's C++ has it, over these storages (bytes, on the host; one for each of
    the parts'). With a device all tensors are copied there, while the interpreter is held.

    Raises `Refused` for whatever torch says, unless it is that memory ran out.
    """
    if not all(hasattr(_C, name) for name in _NEEDED):
        raise Refused("this version of torch has no way to import from a file object")
    held = not parts.mentions(b"quantized")
    archive = _Courteous(_archive(parts, held=held))
    context = _C.DeserializationStorageContext()
    for key, storage in weights.items():
        context.add_storage(key, storage)
    for key, storage in constants.items():
        context.add_storage(_CONSTANT + key, storage)
    try:
        # Tensors made in inference mode cannot be used outside of it.
        with _IMPORTING, torch.inference_mode(mode=False):
            module = _C._import_ir_module_from_package(  # noqa: SLF001
                _C.CompilationUnit(), _C.PyTorchFileReader(archive), context, device, "0"
            )
        return module.getattr("held")[0] if held else module
    except Exception as error:  # torch lets out whatever C++ throws
        if diagnose(error).code == "resource_exhausted":
            raise
        raise Refused(str(error)) from error


def load_plainly(file: ScatteredFile, device: torch.device, model: ModelId, reason: str) -> Any:
    """The last resort: `torch.jit.load`, which stalls everything else. Raises whatever torch
    raises."""
    reason = reason[:200]
    PLAIN_LOADS[reason] += 1
    print(  # noqa: T201 — the agent logs our stderr
        f"{model} is loaded by torch.jit.load, which stalls all batches: {reason!r}",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.NamedTemporaryFile(suffix=".pt") as copy:
        with file.open() as original:
            shutil.copyfileobj(original, copy, 4 << 20)
        copy.flush()
        load: Any = torch.jit.load  # torch leaves it untyped
        with _IMPORTING:
            return load(copy.name, map_location=device)._c  # noqa: SLF001


class _Courteous(io.BytesIO):
    """Lets other threads run when it is asked to seek, which is before each read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._since = time.perf_counter()

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if time.perf_counter() - self._since > _MAX_HOLD_S:
            time.sleep(_NAP_S)
            self._since = time.perf_counter()
        return super().seek(offset, whence)


def _archive(parts: Parts, *, held: bool) -> bytes:
    """The program as `torch.package` would have written it."""
    texts = {
        name if "version" in name or name == "byteorder" else _placed(name): text
        for name, text in parts.texts.items()
    }
    texts[_placed("constants.pkl")] = rename_storages(parts.texts["constants.pkl"], _CONSTANT)
    if held:
        path = _placed(f"code/{_HOLDER.replace('.', '/')}.py")
        texts[path], texts[_placed("data.pkl")] = _hold(parts.texts["data.pkl"])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in texts.items():
            archive.writestr(zipfile.ZipInfo(f"program/{name}"), text)
    return out.getvalue()


def _placed(name: str) -> str:
    return f".data/ts_code/{name if name.startswith('code/') else f'0/{name}'}"


def _hold(pickle: bytes) -> tuple[bytes, bytes]:
    """Code and pickle of a module whose only attribute is a tuple with the pickle's module."""
    names = pickle[3:].split(b"\n", 2)
    if pickle[:3] != b"\x80\x02c" or pickle[-1:] != b"." or len(names) < 3:
        raise Refused("its root is not a module")
    root = b".".join(names[:2]).decode()
    code = (
        "class Holder(Module):\n"
        "  __parameters__ = []\n"
        "  __buffers__ = []\n"
        f"  held : Tuple[{root}]\n"
    )
    before = f"\x80\x02c{_HOLDER}\nHolder\n)\x81}}(X\x04\x00\x00\x00held".encode("latin-1")
    return code.encode(), before + pickle[2:-1] + b"\x85ub."


def rename_storages(pickle: bytes, prefix: str) -> bytes:
    """The pickle with the prefix before all its storages' keys. Raises `Refused` for a pickle
    that torch would not have written."""
    opcodes: list[tuple[Any, Any, int]] = []
    try:
        opcodes += ((opcode, argument, at or 0) for opcode, argument, at in genops(pickle))
    except Exception as error:
        raise Refused(f"its constants cannot be read: {error}") from error
    names = [opcode.name for opcode, _, _ in opcodes]
    memos: set[int] = set()
    """Entries of the memo that hold a key."""
    pieces: list[bytes] = []
    done = 0
    parts: list[int] = []
    """What was pushed since the last mark."""
    for index, name in enumerate(names):
        if name == "MARK":
            parts = []
        elif name == "BINPERSID":
            # Of the kind "storage", the type, the key, the device, the size; and their tuple.
            if len(parts) != 6 or names[parts[2]] != "BINUNICODE" or names[parts[5]] != "TUPLE":
                raise Refused("its constants are written in an unknown way")
            _, key, at = opcodes[parts[2]]
            follower, memo, end = opcodes[parts[2] + 1]
            if follower.name in _PUTS:
                memos.add(memo)
            text = (prefix + key).encode()
            pieces += [pickle[done:at], b"X", struct.pack("<I", len(text)), text]
            done = end
        elif name not in _PUTS:
            parts.append(index)
    if any(name in _GETS and opcodes[at][1] in memos for at, name in enumerate(names)):
        raise Refused("the key of one of its constants is something else as well")
    return b"".join([*pieces, pickle[done:]])
