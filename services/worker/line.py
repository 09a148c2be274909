"""The agent's end of a socket to the engine, in the event loop without a detour: it sends at
once, and what comes is read, cut and handed on in one callback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from services.worker.frames import Frames

_REST_READS: Final = 16


class Line:
    """Open until `close`. The engine's end of it may be anything: what it says is not trusted."""

    def __init__(
        self,
        sock: socket.socket,
        heard: Callable[[memoryview], None],
        broken: Callable[[Exception | None], None],
    ) -> None:
        """`heard` gets each frame's body, valid during the call. `broken` gets what the socket,
        the framing or `heard` raised, or None at the stream's end; at most once. Must be made
        in a running event loop."""
        sock.setblocking(False)
        self._sock = sock
        self._heard = heard
        self._broken = broken
        self._frames = Frames(sock)
        self._unsent = bytearray()
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._loop.add_reader(sock, self._read)

    def send(self, frame: bytes) -> None:
        """Now, or after what is waiting already. Without effect when nobody listens any more:
        the reading side tells of that."""
        if not self._open:
            return
        if self._unsent:
            self._unsent += frame
            return
        try:
            sent = self._sock.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            return
        if sent < len(frame):
            self._unsent += frame[sent:]
            self._loop.add_writer(self._sock, self._write)

    def read_rest(self) -> None:
        """What has come already is heard now: no more than a socket holds, so that an engine
        that never stops talking does not keep us."""
        for _ in range(_REST_READS):
            if not (self._open and self._read()):
                return

    def close(self) -> None:
        """Nothing is heard any more, and nothing waiting is sent."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()

    def _write(self) -> None:
        try:
            del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()
        if not self._unsent:
            self._loop.remove_writer(self._sock)

    def _read(self) -> bool:
        """Whether there may be more."""
        error: Exception | None = None
        try:
            if self._frames.receive():
                while self._open and (body := self._frames.take()) is not None:
                    self._heard(body)
                return True
        except BlockingIOError:
            return False
        except Exception as raised:  # noqa: BLE001 — whatever an engine can bring about
            error = raised
        if self._open:
            self.close()
            self._broken(error)
        return False
