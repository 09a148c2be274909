"""The frames of the sockets between agent and engine: four bytes of length, then the body."""

from __future__ import annotations

import socket
from typing import Final

from services.worker.wire import MAX_FRAME

_ROOM: Final = 1 << 16
_LENGTH: Final = 4


class BadFrame(Exception):
    """The bytes on the socket are no frames. Nothing after them can be understood."""


class Frames:
    """Reads a stream socket into one buffer and cuts whole frames out of it, in place."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray(_ROOM)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0

    def receive(self, flags: int = 0) -> bool:
        """One read from the socket; False at the end of the stream. Bodies that `take` returned
        before are gone. Raises `BlockingIOError` where there is nothing to read now, and what
        else a socket raises."""
        if self._start:
            left = self._end - self._start
            self._view[:left] = self._view[self._start : self._end]
            self._start, self._end = 0, left
        count = self._sock.recv_into(self._view[self._end :], 0, flags)
        self._end += count
        return count > 0

    def take(self) -> memoryview | None:
        """The body of the next frame, until the next `receive`; None when it is not whole yet.
        Raises `BadFrame` for a length that no message has."""
        start = self._start + _LENGTH
        if start > self._end:
            return None
        size = int.from_bytes(self._view[self._start : start], "little")
        if size > MAX_FRAME:
            raise BadFrame(f"a frame of {size:,} bytes")
        if start + size > self._end:
            if _LENGTH + size > len(self._buffer):
                self._grow(_LENGTH + size)
            return None
        self._start = start + size
        return self._view[start : start + size]

    def _grow(self, size: int) -> None:
        buffer = bytearray(size)
        left = self._end - self._start
        buffer[:left] = self._view[self._start : self._end]
        self._buffer, self._view = buffer, memoryview(buffer)
        self._start, self._end = 0, left
