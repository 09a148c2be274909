"""Takes a TorchScript file apart, without torch and without trust.

Nothing in the file is run or imported, and whatever is in it, the time is that of reading it
once, and the memory is bounded. What is not understood becomes an obstacle: such a file is served
all the same, only as it is.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from typing import BinaryIO, Final, NamedTuple

from shared.archive import check_torchscript
from shared.layout.code import Canon, definitions, is_code
from shared.layout.model import Block, Layout, Slot
from shared.layout.objects import Walk
from shared.layout.pickled import read_pickle
from shared.layout.records import Record, Records, Unreadable
from shared.layout.shares import find_shares
from shared.layout.writes import may_write

MAX_PICKLE_BYTES: Final = 16 << 20
"""Of `data.pkl`, and of `constants.pkl`. BERT-base has 34 kB."""
MAX_CODE_BYTES: Final = 4 << 20
"""Of all code together. BERT-base has 128 kB."""
MAX_CONSTANT_BYTES: Final = 1 << 30
"""Of all constants' tensors together: they are on a device as often as there are architectures,
and no model's own. Who has more than that has weights among them."""

_DATA: Final = "data/"
_CONSTANTS: Final = "constants/"
_READ_BYTES: Final = 4 << 20
_LENGTH: Final = struct.Struct("<Q")


def read_layout(file: BinaryIO | str | os.PathLike[str], *, share: bool = True) -> Layout:
    """What is inside. A file object must be seekable, and is left open. Without `share` no
    shares are told.

    Raises `InvalidRequest` when the file is not TorchScript; otherwise only what reading raises.
    """
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:  # noqa: PTH123 — callers hold plain strings
            return read_layout(opened, share=share)
    records = Records(file, check_torchscript(file))
    try:
        program = _read_program(records)
    except Unreadable as obstacle:
        return Layout(obstacle=str(obstacle), blocks=_hash(file, _stored(records)))
    blocks = _hash(file, program.blocks)
    constants = _hash(file, program.constants)
    return Layout(
        architecture=_architecture(program, constants),
        may_write=program.may_write,
        blocks=blocks,
        slots=program.slots,
        shares=find_shares(blocks, program.slots) if share else (),
    )


class _Program(NamedTuple):
    """All but the contents of the tensors."""

    texts: tuple[bytes, ...]
    """What makes it the same program as another."""
    blocks: tuple[Record, ...]
    constants: tuple[Record, ...]
    slots: tuple[Slot, ...]
    may_write: bool


def _read_program(records: Records) -> _Program:
    if "model.json" in records:
        raise Unreadable("it is in the format before torch 1.4")
    if "byteorder" in records and records.read("byteorder", 16).strip() != b"little":
        raise Unreadable("it was written on a big-endian machine")
    code = _read_code(records)
    if any("def __setstate__(" in text for text in code.values()):
        raise Unreadable("its code has a __setstate__, which runs while it is loaded")
    known = definitions(code)
    canon = Canon(known)
    grads = any("requires_grad" in text for text in code.values())
    data = Walk(known, canon, module=True, grads=grads)
    graph = data.run(read_pickle(records.read("data.pkl", MAX_PICKLE_BYTES)))
    fixed = Walk(known, canon, module=False, grads=grads)
    constants = fixed.run(read_pickle(records.read("constants.pkl", MAX_PICKLE_BYTES)))
    if sum(fixed.sizes) > MAX_CONSTANT_BYTES:
        raise Unreadable(
            f"its constants have {sum(fixed.sizes):,} bytes, more than {MAX_CONSTANT_BYTES:,}"
        )
    # Operators mean what they meant in the version of torch that wrote the file.
    versions = [
        records.read(name, 1024) for name in ("version", ".data/version") if name in records
    ]
    return _Program(
        texts=(*versions, graph, constants, *(text.encode() for text in canon.program())),
        blocks=_find(records, _DATA, data),
        constants=_find(records, _CONSTANTS, fixed),
        slots=tuple(data.slots),
        may_write=may_write(code.values()),
    )


def _read_code(records: Records) -> dict[str, str]:
    files: dict[str, str] = {}
    left = MAX_CODE_BYTES
    for name in records.names():
        if is_code(name):
            data = records.read(name, left)
            left -= len(data)
            try:
                files[name] = data.decode()
            except UnicodeDecodeError as error:
                raise Unreadable(f"{name[:80]} is not UTF-8") from error
    return files


def _find(records: Records, folder: str, walk: Walk) -> tuple[Record, ...]:
    found: list[Record] = []
    for key, size in zip(walk.keys, walk.sizes, strict=True):
        record = records.find(f"{folder}{key}")
        if record.packed:
            raise Unreadable("its tensors are compressed")
        if record.nbytes != size:
            raise Unreadable(f"storage {key[:80]} has {record.nbytes:,} bytes, not {size:,}")
        found.append(record)
    return tuple(found)


def _stored(records: Records) -> list[Record]:
    """What look like storages, in a file that is not understood: the same bytes may be in
    another, so that they are kept once."""
    found: list[Record] = []
    for name in records.names():
        if name.startswith(_DATA) and not name.endswith("/"):
            try:
                record = records.find(name)
            except Unreadable:
                continue
            if not record.packed:
                found.append(record)
    return found


def _hash(file: BinaryIO, records: Iterable[Record]) -> tuple[Block, ...]:
    """In the order in which they lie in the file: one pass."""
    records = list(records)
    digests: dict[int, bytes] = {}
    buffer = memoryview(bytearray(_READ_BYTES))
    for record in sorted(records):
        digest = hashlib.sha256()
        file.seek(record.offset)
        left = record.nbytes
        while left:
            count = file.readinto(buffer[: min(left, _READ_BYTES)])  # type: ignore[attr-defined]
            if not count:
                raise EOFError("the file became shorter while it was read")
            digest.update(buffer[:count])
            left -= count
        digests[record.offset] = digest.digest()
    return tuple(Block(digests[each.offset], each.offset, each.nbytes) for each in records)


def _architecture(program: _Program, constants: Iterable[Block]) -> str:
    digest = hashlib.sha256()
    for text in program.texts:
        digest.update(_LENGTH.pack(len(text)))
        digest.update(text)
    for block in constants:
        digest.update(block.digest)
    return digest.hexdigest()
