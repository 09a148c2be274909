"""A model's file, read without holding the interpreter."""

from __future__ import annotations

import bisect
import io
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from services.worker.engine.failures import Failed
from shared.layout import Extent

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MOST_OPEN: Final = 8
"""Descriptors that one file keeps; the one that was used longest ago is closed for another."""
_MOST_BUFFERS: Final = 1000
"""In one read: the system takes 1024."""
_WIDEST_GAP: Final = 64 << 10
"""What lies between two wanted stretches is read as well, up to so much, and thrown away: the
headers between a zip's entries are not worth a call each."""


class Piece(NamedTuple):
    """Bytes of the file and where they shall go."""

    offset: int
    view: memoryview


class ScatteredFile:
    """One file, whose stretches may lie in several local ones.

    Any thread may read; one reads at a time. What cannot be read, or is shorter than it should
    be, raises `Failed` with `model_failed`.
    """

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._extents = tuple(extents)
        self._ends = list(itertools.accumulate(extent.nbytes for extent in self._extents))
        self.size = self._ends[-1] if self._ends else 0
        """In bytes."""
        self._fds: dict[str, int] = {}
        """By path, the one used last at the end."""
        self._lock = threading.Lock()
        self._waste = memoryview(bytearray(_WIDEST_GAP))

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` with the bytes from `offset` on."""
        self.read_pieces((Piece(offset, view),))

    def read_pieces(self, pieces: Iterable[Piece]) -> None:
        """Fills all views, with as few calls as the order of the offsets allows. The views are
        contiguous and of bytes."""
        with self._lock:
            for extent, run in itertools.groupby(self._split(pieces), key=lambda part: part[0]):
                self._read(self._extents[extent], [piece for _, piece in run])

    def open(self) -> io.RawIOBase:
        """The file as Python has files: readable, seekable, with a position of its own. Closing
        it leaves this one open."""
        return _Reader(self)

    def close(self) -> None:
        """Gives the descriptors back; reading again opens them again. Idempotent."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])

    # --- under the lock

    def _split(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, Piece]]:
        """Each piece cut where an extent ends; with the index of the extent, and offsets in the
        local file."""
        for offset, view in pieces:
            at, end = offset, offset + view.nbytes
            if offset < 0 or end > self.size:
                raise Failed(
                    "model_failed",
                    f"the model's file is cut short: bytes {offset:,} to {end:,} are wanted, "
                    f"it has {self.size:,}",
                )
            while at < end:
                index = bisect.bisect(self._ends, at)
                extent = self._extents[index]
                start = self._ends[index] - extent.nbytes
                until = min(end, self._ends[index])
                yield index, Piece(extent.offset + at - start, view[at - offset : until - offset])
                at = until

    def _read(self, extent: Extent, pieces: Sequence[Piece]) -> None:
        """All of one local file."""
        try:
            fd = self._descriptor(extent.path)
            for offset, buffers in self._calls(pieces):
                _read_fully(fd, offset, buffers)
        except EOFError as error:
            raise Failed("model_failed", f"{extent.path} is cut short: {error}") from None
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise Failed("model_failed", f"cannot read {extent.path}: {why}") from None

    def _calls(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, list[memoryview]]]:
        """One read each: where it begins, and the buffers that it fills one after the other."""
        start, at = 0, -1
        buffers: list[memoryview] = []
        for offset, view in pieces:
            gap = offset - at
            if not buffers or not 0 <= gap <= _WIDEST_GAP or len(buffers) + 2 > _MOST_BUFFERS:
                if buffers:
                    yield start, buffers
                start, buffers = offset, []
            elif gap:
                buffers.append(self._waste[:gap])
            buffers.append(view)
            at = offset + view.nbytes
        if buffers:
            yield start, buffers

    def _descriptor(self, path: str) -> int:
        fd = self._fds.pop(path, None)
        if fd is None:
            if len(self._fds) >= _MOST_OPEN:
                os.close(self._fds.pop(next(iter(self._fds))))
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._fds[path] = fd
        return fd


class _Reader(io.RawIOBase):
    """A position in a scattered file."""

    def __init__(self, file: ScatteredFile) -> None:
        super().__init__()
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise ValueError(f"there is no position {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        count = min(view.nbytes, self._file.size - self._at)
        if count <= 0:
            return 0
        self._file.read_into(self._at, view[:count])
        self._at += count
        return count


def _read_fully(fd: int, offset: int, buffers: list[memoryview]) -> None:
    """Raises `EOFError` where the file ends before."""
    while buffers:
        count = os.preadv(fd, buffers, offset)
        if not count and any(buffer.nbytes for buffer in buffers):
            wanted = sum(buffer.nbytes for buffer in buffers)
            raise EOFError(f"{wanted:,} bytes from {offset:,} on are missing")
        offset += count
        # A call may return early: the system moves 2 GiB at once and no more.
        full = 0
        while full < len(buffers) and count >= buffers[full].nbytes:
            count -= buffers[full].nbytes
            full += 1
        buffers = [buffers[full][count:], *buffers[full + 1 :]] if full < len(buffers) else []
