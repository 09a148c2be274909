"""Is this file a model? Answered without torch, from the zip's directory alone.

A TorchScript file is a program: whoever loads it runs it. This check makes no file safe; it
tells apart what is a model, what is half of one, what is a checkpoint that somebody meant to
export, and what was built to fill a disk or a memory. It reads the end of the file and no
tensor, so it costs as much for 50 GB as for 50 KB.
"""

from __future__ import annotations

import os
import struct
import zipfile
from typing import BinaryIO, Final, NamedTuple

from shared.errors import InvalidRequest

MAX_ENTRIES: Final = 100_000
MAX_DIRECTORY_BYTES: Final = 64 << 20
"""The zip's directory is read into memory; a hundred thousand entries need some 10 MB."""
MAX_CODE_BYTES: Final = 64 << 20
"""For one file below `code/`. These are compressed, so their size is only a promise."""
MAX_RATIO: Final = 20
RATIO_SLACK_BYTES: Final = 64 << 20
"""TorchScript stores tensors uncompressed. What would unpack to more than 20 times the file
(and 64 MiB, for small files that are mostly code) was not written by torch."""

_END: Final = struct.Struct("<4s4H2LH")
_END64_LOCATOR: Final = struct.Struct("<4sLQL")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_ENTRY: Final = struct.Struct("<28x3H12x")
"""An entry of the directory: the lengths of what follows it."""
_LOCAL_HEADER_BYTES: Final = 30
_LEGACY_CHECKPOINT: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_EXPORT_HINT: Final = "export with torch.jit.trace/script and .save()"
_CHECKPOINT: Final = f"a torch.save checkpoint, not TorchScript: {_EXPORT_HINT}"


class Member(NamedTuple):
    """A file in an archive, as the directory has it."""

    header_at: int
    """Its local header; the content comes after that."""
    nbytes: int
    packed_nbytes: int
    """What it takes in the archive."""
    packed: bool
    """Compressed."""


class Archive(NamedTuple):
    """What a checked archive has in it."""

    root: str
    """The one folder that holds everything."""
    members: dict[str, Member]
    """By their names below it."""
    directory_at: int
    """Where the contents end."""


def check_torchscript(path_or_file: str | os.PathLike[str] | BinaryIO) -> Archive:
    """Raises `InvalidRequest`, saying what the file is instead, unless it is TorchScript.

    A file object must be seekable; it is left open, wherever the reading ended.
    """
    if isinstance(path_or_file, str | os.PathLike):
        with open(path_or_file, "rb") as file:  # noqa: PTH123 — callers hold plain strings
            return check_torchscript(file)
    archive = read_archive(path_or_file, "TorchScript", _EXPORT_HINT)
    _check_members(archive)
    return archive


def read_archive(file: BinaryIO, what: str, hint: str) -> Archive:
    """The basic check for any format of torch's that is a zip: whole, with one root folder, no
    bomb, nothing hidden. `what` names the format that was expected and `hint` how one comes to
    such a file; both are for the message of `InvalidRequest`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    if not head:
        raise InvalidRequest("the file is empty")
    if head.startswith(_LEGACY_CHECKPOINT):
        raise InvalidRequest(
            f"a torch.save checkpoint, not {what}: {hint} (it is in the format before torch 1.6)"
        )
    if head.startswith(b"\x80") and head[1:2] <= b"\x05":
        raise InvalidRequest(f"a pickle, not {what}: {hint}")
    if not head.startswith(b"PK"):
        raise InvalidRequest(f"not a zip archive, so not {what}")
    directory_at, directory_bytes = _find_directory(file, size)
    _count_entries(file, directory_at, directory_bytes)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        struct.error,
        ValueError,
        OverflowError,
    ) as error:
        raise InvalidRequest(f"the zip archive's directory is damaged: {error}") from error
    root = _check_names(entries, what)
    _check_sizes(entries, root, size, directory_at)
    members = {
        entry.orig_filename[len(root) + 1 :]: Member(
            entry.header_offset,
            entry.file_size,
            entry.compress_size,
            entry.compress_type != zipfile.ZIP_STORED,
        )
        for entry in entries
    }
    return Archive(root, members, directory_at)


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the zip's directory begins, and its length. Checked before zipfile sees it, because
    zipfile reads the directory whole, however long it says it is, and forgives bytes in front."""
    tail_at = max(0, size - _END.size - 0xFFFF)
    file.seek(tail_at)
    tail = file.read(size - tail_at)
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or len(tail) - found < _END.size:
        raise InvalidRequest(
            f"the zip archive is truncated: its directory is missing after {size:,} bytes"
        )
    end_at = tail_at + found
    _, _, _, _, count, length, offset, _ = _END.unpack_from(tail, found)
    locator_at = end_at - _END64_LOCATOR.size
    if locator_at >= 0:
        file.seek(locator_at)
        signature, _, end64_at, _ = _END64_LOCATOR.unpack(file.read(_END64_LOCATOR.size))
        if signature == b"PK\x06\x07":
            if end64_at + _END64.size > locator_at:
                raise InvalidRequest("the zip archive's directory is damaged: it ends nowhere")
            file.seek(end64_at)
            fields = _END64.unpack(file.read(_END64.size))
            if fields[0] != b"PK\x06\x06":
                raise InvalidRequest("the zip archive's directory is damaged: it ends nowhere")
            count, length, offset = fields[-3:]
            end_at = end64_at
    if count > MAX_ENTRIES:
        raise InvalidRequest(f"the archive has {count:,} entries, at most {MAX_ENTRIES:,} may be")
    if length > MAX_DIRECTORY_BYTES:
        raise InvalidRequest(f"the archive's directory says it has {length:,} bytes")
    if offset + length != end_at:
        raise InvalidRequest(
            "the zip archive is truncated or padded: its directory should begin at byte "
            f"{offset:,} and have {length:,} bytes, but it ends at byte {end_at:,}"
        )
    return int(offset), int(length)


def _count_entries(file: BinaryIO, at: int, nbytes: int) -> None:
    """Of the directory, whatever its end says: zipfile reads on while there are bytes, and makes
    an object of half a kilobyte of each 46."""
    file.seek(at)
    directory = file.read(nbytes)
    found = offset = 0
    while offset + _ENTRY.size <= len(directory):
        found += 1
        if found > MAX_ENTRIES:
            raise InvalidRequest(
                f"the archive has more than the {MAX_ENTRIES:,} entries that may be"
            )
        name_bytes, extra_bytes, note_bytes = _ENTRY.unpack_from(directory, offset)
        offset += _ENTRY.size + name_bytes + extra_bytes + note_bytes


def _check_names(entries: list[zipfile.ZipInfo], what: str) -> str:
    """The one folder that holds everything."""
    names: set[str] = set()
    for entry in entries:
        name = entry.orig_filename
        if "\0" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
            raise InvalidRequest(f"the archive has an entry with an unsafe name: {name[:80]!r}")
        if name in names:
            raise InvalidRequest(f"the archive has two entries named {name[:80]!r}")
        names.add(name)
    roots = {name.partition("/")[0] for name in names if "/" in name}
    if len(roots) != 1 or any("/" not in name for name in names):
        raise InvalidRequest(f"a zip archive, but not {what}: it has no single root folder")
    return roots.pop()


def _check_members(archive: Archive) -> None:
    names = archive.members.keys()
    has_code = any(name.startswith("code/") and name != "code/" for name in names)
    if "data.pkl" in names and not has_code:
        raise InvalidRequest(_CHECKPOINT)
    if "archive_format" in names or "models/model.json" in names:
        raise InvalidRequest(f"a torch.export package, not TorchScript: {_EXPORT_HINT}")
    missing = [name for name in ("data.pkl", "constants.pkl") if name not in names]
    missing += [] if has_code else ["code/"]
    # Newer torch keeps the version beside its other notes, below `.data/`.
    missing += [] if names & {"version", ".data/version"} else ["version"]
    if missing:
        what = ", ".join(f"{archive.root[:80]}/{name}" for name in missing)
        raise InvalidRequest(f"a zip archive, but not TorchScript: it has no {what}")


def _check_sizes(
    entries: list[zipfile.ZipInfo], root: str, file_size: int, directory_at: int
) -> None:
    total = 0
    code = f"{root}/code/"
    for entry in entries:
        name = entry.filename[:80]
        if entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise InvalidRequest(f"entry {name!r} is compressed in a way that torch does not read")
        if entry.flag_bits & 0x1:
            raise InvalidRequest(f"entry {name!r} is encrypted")
        stored = entry.compress_type == zipfile.ZIP_STORED
        if stored and entry.compress_size != entry.file_size:
            raise InvalidRequest(f"entry {name!r} is stored but its two sizes differ")
        if entry.filename.startswith(code) and entry.file_size > MAX_CODE_BYTES:
            raise InvalidRequest(
                f"a zip bomb: code file {name!r} would unpack to {entry.file_size:,} bytes"
            )
        total += entry.file_size
    if total > file_size * MAX_RATIO + RATIO_SLACK_BYTES:
        raise InvalidRequest(
            f"a zip bomb: {file_size:,} bytes would unpack to {total:,}, "
            "and torch does not compress tensors"
        )
    # Entries that overlap are the other kind of bomb: every one small, all the same bytes.
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise InvalidRequest(f"entry {entry.filename[:80]!r} overlaps another")
        end = entry.header_offset + _LOCAL_HEADER_BYTES + entry.compress_size
    if end > directory_at:
        raise InvalidRequest("the zip archive is truncated: an entry reaches into its directory")
