"""TLS in front of the server's protocol, which then sees plain bytes.

Not by the server's own means: it would take the certificate once for its whole life, count a
connection only when its handshake is through, and wait a minute for that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, cast

import structlog

from shared.http.crowd import Crowd
from shared.tls import HANDSHAKE_TIMEOUT_S, Identity, explain
from shared.v2 import error_body

log = structlog.get_logger(__name__)

SHUTDOWN_TIMEOUT_S: Final = 5.0
"""For a client to say goodbye in its turn; then the connection is closed without."""
FAILURES_LOGGED_S: Final = 10.0
"""A log line tells of the handshakes that failed in so long: any client can provoke them."""

_HANDSHAKE: Final = 0x16
"""The first byte of whoever speaks TLS."""
_SAID: Final = error_body("TLS is spoken here: the URL begins with https://")
_PLAIN: Final = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_SAID), _SAID)
)


class Failures:
    """Tells of handshakes that failed, seldom."""

    def __init__(self) -> None:
        self._count = 0
        self._told_at = -FAILURES_LOGGED_S

    def note(self, why: str) -> None:
        self._count += 1
        now = time.monotonic()
        if now - self._told_at >= FAILURES_LOGGED_S:
            log.info("tls_handshakes_failed", count=self._count, last=why)
            self._count = 0
            self._told_at = now


class Handshake(asyncio.Protocol):
    """One connection until its handshake is through; then another protocol has it."""

    transport: asyncio.Transport

    def __init__(
        self,
        identity: Identity,
        crowd: Crowd,
        failures: Failures,
        handshaking: set[Handshake],
        behind: Callable[[], asyncio.Protocol],
    ) -> None:
        """`handshaking` holds it meanwhile, for whoever ends the server. `behind` makes the
        protocol that gets the connection; it enters the crowd by itself."""
        self._identity = identity
        self._crowd = crowd
        self._failures = failures
        self._handshaking = handshaking
        self._behind = behind
        self._loop = asyncio.get_running_loop()
        self._clock: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._hello = b""
        self._early = bytearray()
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        self._handshaking.add(self)
        if self._crowd.enter(self):
            self._clock = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self.transport.abort)
        else:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._task is not None:
            # Decrypted, and here before the task had its turn.
            self._early += data
            return
        if data[0] != _HANDSHAKE:
            self._failures.note("plain text came where TLS is spoken")
            self.transport.write(_PLAIN)
            self.transport.close()
            return
        # Only now, so that those who come without TLS can be told. `start_tls` wants to read by
        # itself: what came first is handed to its protocol once that is connected, which is two
        # turns of the loop from here, and before it may read any more.
        self.transport.pause_reading()
        self._hello = data
        self._task = self._loop.create_task(self._secure(), name="tls handshake")
        self._loop.call_soon(self._loop.call_soon, self._say_hello)

    def eof_received(self) -> None:
        self._ended = True

    def connection_lost(self, _exc: Exception | None) -> None:
        self._leave()

    def shutdown(self) -> None:
        """The server ends."""
        self.transport.abort()

    def _leave(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
        self._handshaking.discard(self)
        self._crowd.leave(self)

    def _say_hello(self) -> None:
        protocol = self.transport.get_protocol()
        assert protocol is not self, "start_tls has set its own"
        secure = cast("asyncio.BufferedProtocol", protocol)
        left = memoryview(self._hello)
        while left and not self.transport.is_closing():
            buffer = memoryview(secure.get_buffer(len(left)))
            taken = min(len(buffer), len(left))
            buffer[:taken] = left[:taken]
            secure.buffer_updated(taken)
            left = left[taken:]
        self._hello = b""

    async def _secure(self) -> None:
        try:
            secured = await self._loop.start_tls(
                self.transport,
                self,
                self._identity.current(),
                server_side=True,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            )
        except OSError as error:  # SSLError is one
            self._failures.note(explain(error) or repr(error))
            self.transport.abort()
            return
        finally:
            self._leave()
        if secured is None or secured.is_closing():
            return  # it was lost meanwhile
        behind = self._behind()
        secured.set_protocol(behind)
        behind.connection_made(secured)
        if self._early and not secured.is_closing():
            behind.data_received(bytes(self._early))
        if self._ended and not secured.is_closing():
            behind.eof_received()
