"""Shared memory between agent and engine: a region, and who has which bytes of it.

A region is an anonymous file (`memfd_create`), which the size of /dev/shm does not limit; its
descriptor is inherited by the engine. On Linux its size is sealed: an engine runs programs of
strangers, and one that shrank the file would kill the agent with SIGBUS at its next read.

The allocator's laws: blocks do not overlap, every offset is a multiple of `ALIGNMENT`, free
neighbours are always joined, and used + free = capacity.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import tempfile
from typing import Final, Self

ALIGNMENT: Final = 64
"""A cache line, and what torch aligns its own tensors to."""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to whole `ALIGNMENT` units; at least one."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


class Arena:
    """A shared region of `capacity` bytes, mapped for reading and writing.

    Views of `view` that are still alive (a tensor, say) keep the mapping alive past `close`.
    """

    def __init__(self, fd: int, capacity: int) -> None:
        self.fd = fd
        """Hand it to the engine by `pass_fds`."""
        self.capacity = capacity
        self._map = mmap.mmap(fd, capacity)
        self.view = memoryview(self._map)

    @classmethod
    def create(cls, name: str, capacity: int) -> Self:
        """A new zeroed region; `name` is for people who read /proc. Memory is taken as pages
        are first written. Raises `OSError`, or `ValueError` for a capacity under 1."""
        if capacity < 1:
            raise ValueError(f"a region needs at least one byte, not {capacity}")
        fd = _anonymous_file(name, capacity)
        try:
            return cls(fd, capacity)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> Self:
        """The region behind an inherited descriptor."""
        return cls(fd, os.fstat(fd).st_size)

    def close(self) -> None:
        """Gives the descriptor back, and the mapping unless somebody still looks at it."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()

    def __repr__(self) -> str:
        return f"<Arena fd={self.fd} {self.capacity:,} bytes>"


def _anonymous_file(name: str, capacity: int) -> int:
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            os.ftruncate(file.fileno(), capacity)
            return os.dup(file.fileno())
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, capacity)
        _seal_size(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _seal_size(fd: int) -> None:
    import fcntl

    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    with contextlib.suppress(OSError):  # a sandbox may refuse; then it is as a temporary file
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


class Allocator:
    """First fit over `capacity` bytes. Not thread-safe: the region's writer owns it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        """Whole units; the largest block that can ever be had."""
        self.used = 0
        """Bytes handed out, rounded up to whole units."""
        self._starts: list[int] = [0] if self.capacity else []
        self._sizes: dict[int, int] = {0: self.capacity} if self.capacity else {}
        self._blocks: dict[int, int] = {}

    def alloc(self, nbytes: int) -> int | None:
        """The offset of a free block of at least `nbytes`, or None when there is none now.

        Zero bytes take one unit, so that every block has its own offset. Raises `ValueError`
        for a negative size.
        """
        if nbytes < 0:
            raise ValueError(f"a block cannot have {nbytes} bytes")
        size = aligned(nbytes)
        for index, start in enumerate(self._starts):
            room = self._sizes[start]
            if room < size:
                continue
            del self._sizes[start]
            if room == size:
                del self._starts[index]
            else:
                self._starts[index] = start + size
                self._sizes[start + size] = room - size
            self._blocks[start] = size
            self.used += size
            return start
        return None

    def free(self, offset: int) -> None:
        """Gives a block back. Raises `ValueError` when no block begins at `offset`."""
        size = self._blocks.pop(offset, None)
        if size is None:
            raise ValueError(f"no block begins at {offset}")
        self.used -= size
        index = bisect.bisect(self._starts, offset)
        if index < len(self._starts) and self._starts[index] == offset + size:
            size += self._sizes.pop(self._starts.pop(index))
        if index and (before := self._starts[index - 1]) + self._sizes[before] == offset:
            self._sizes[before] += size
            return
        self._starts.insert(index, offset)
        self._sizes[offset] = size

    def validate(self) -> None:
        """Recomputes the laws of this module's header; raises `AssertionError`."""
        spans = sorted([*self._blocks.items(), *self._sizes.items()])
        end = 0
        for start, size in spans:
            assert start == end, f"gap or overlap at {start}: {self!r}"
            assert start % ALIGNMENT == 0, f"{start} is not aligned"
            end = start + size
        assert end == self.capacity, f"{end} of {self.capacity} bytes are accounted for"
        assert self.used == sum(self._blocks.values())
        assert self._starts == sorted(self._sizes), "the free list is out of order"
        ends = {start + size for start, size in self._sizes.items()}
        assert not ends & self._sizes.keys(), "free neighbours are not joined"

    def __repr__(self) -> str:
        return (
            f"<Allocator {self.used:,} of {self.capacity:,} bytes used, "
            f"{len(self._blocks)} blocks, {len(self._starts)} holes>"
        )
