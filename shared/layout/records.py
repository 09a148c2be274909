"""The contents of an archive's members, read as torch reads them."""

from __future__ import annotations

import bisect
import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, Final, NamedTuple

from shared.archive import Archive, Member

_LOCAL: Final = struct.Struct("<4s22xHH")


class Unreadable(Exception):
    """Something that this package does not understand. The message says what."""


class Record(NamedTuple):
    """Where a member's content lies in the file."""

    offset: int
    nbytes: int
    packed_nbytes: int
    packed: bool


class Records:
    """Finds members by name. The local headers say where each content begins: they may be longer
    than the directory knows, since torch fills them up to align what follows."""

    def __init__(self, file: BinaryIO, archive: Archive) -> None:
        self._file = file
        self._members = archive.members
        self._bounds = sorted(member.header_at for member in archive.members.values())
        self._bounds.append(archive.directory_at)

    def names(self) -> Iterable[str]:
        return self._members.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def find(self, name: str) -> Record:
        """Raises `Unreadable` when the content is not where it should be."""
        member = self._members.get(name)
        if member is None:
            raise Unreadable(f"it has no {name[:80]}")
        self._file.seek(member.header_at)
        header = self._file.read(_LOCAL.size)
        if len(header) < _LOCAL.size:
            raise Unreadable(f"{name[:80]} is cut off")
        signature, name_bytes, extra_bytes = _LOCAL.unpack(header)
        offset = member.header_at + _LOCAL.size + name_bytes + extra_bytes
        if signature != b"PK\x03\x04" or offset + member.packed_nbytes > self._end(member):
            raise Unreadable(f"{name[:80]} is not where the archive's directory says")
        return Record(offset, member.nbytes, member.packed_nbytes, member.packed)

    def _end(self, member: Member) -> int:
        return self._bounds[bisect.bisect_right(self._bounds, member.header_at)]

    def read(self, name: str, limit: int) -> bytes:
        """The content, unpacked. Raises `Unreadable` when it is damaged, or has more than
        `limit` bytes."""
        record = self.find(name)
        if record.nbytes > limit or record.packed_nbytes > limit:
            raise Unreadable(f"{name[:80]} has {record.nbytes:,} bytes, at most {limit:,} are read")
        self._file.seek(record.offset)
        data = self._file.read(record.packed_nbytes)
        if record.packed:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = inflate.decompress(data, record.nbytes + 1)
            except zlib.error as error:
                raise Unreadable(f"{name[:80]} is damaged: {error}") from error
        if len(data) != record.nbytes:
            raise Unreadable(f"{name[:80]} has not the size that the archive's directory says")
        return data
