"""The control socket: commands in, events out."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Final

import msgspec

from services.worker.wire import MAX_FRAME, Command, Event, pack, unpack_command

_READ_BYTES: Final = 1 << 16


class BadFrame(Exception):
    """The bytes on the socket are no commands. Nothing after them can be understood."""


class Channel:
    """Frames over a stream socket. One thread reads; any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, event: Event) -> None:
        """Whole frames, one after the other. Raises `OSError` when the agent is gone."""
        frame = pack(event)
        with self._sending:
            self._sock.sendall(frame)

    def commands(self) -> Iterator[Command]:
        """Ends when the agent closes its end or is gone. Raises `BadFrame`."""
        buffer = bytearray()
        while True:
            try:
                chunk = self._sock.recv(_READ_BYTES)
            except ConnectionError:
                return
            if not chunk:
                return
            buffer += chunk
            start = 0
            while len(buffer) - start >= 4:
                end = start + 4 + int.from_bytes(buffer[start : start + 4], "little")
                if end - start - 4 > MAX_FRAME:
                    raise BadFrame(f"a frame of {end - start - 4:,} bytes")
                if len(buffer) < end:
                    break
                try:
                    command = unpack_command(bytes(buffer[start + 4 : end]))
                except msgspec.MsgspecError as error:
                    raise BadFrame(str(error)) from error
                start = end
                yield command
            del buffer[:start]
