"""One connection as uvicorn serves it, with bounds on the time and the bytes of what it brings and
on the time of what it takes."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from shared.http.crowd import Crowd
from shared.names import HEADER_CODE
from shared.v2 import error_body

HEAD_TIMEOUT_S: Final = 10.0
"""From the first byte of a request (or the connection's begin) to the end of its headers; also
how long the rest of a body is read whose answer has already gone out."""
SEND_TIMEOUT_S: Final = 30.0
"""From when a client is found to read more slowly than it is answered, until it has the answer."""
HEAD_LIMIT_BYTES: Final = 64 * 1024
"""Request line and headers; one read of the socket more may be held."""


class Config(uvicorn.Config):
    """uvicorn's settings, and what `HttpProtocol` needs beside them."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        crowd: Crowd,
        max_requests: int,
        leaving: asyncio.Event,
        **options: Any,
    ) -> None:
        # Not uvicorn's own limit: that counts idle connections against everybody's requests.
        super().__init__(app, **options)
        self.crowd = crowd
        self.max_requests = max_requests
        self.leaving = leaving


class HttpProtocol(HttpToolsProtocol):
    """uvicorn bounds neither the time nor the bytes of a request's head, and lets idle
    connections count as load; here heads are bounded, connections and requests apart.

    A *cycle* is uvicorn's word for a request whose headers are complete. The clock runs while
    the connection gives bytes that no cycle waits for; an idle keep-alive connection is
    uvicorn's to close.
    """

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._crowd = config.crowd
        self._max_requests = config.max_requests
        self._leaving = config.leaving
        self._clock: asyncio.TimerHandle | None = None
        self._send_clock: asyncio.TimerHandle | None = None
        self._half_sent = False
        self._head_bytes = 0
        self._in_body = False
        self._ended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        if self._crowd.enter(self):
            self._start_clock()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.leave(self)
        self._stop_clock()
        self._stop_send_clock()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._half_sent = True
        if self._send_clock is None:
            self._send_clock = self.loop.call_later(SEND_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._half_sent:  # else more will come: a trickle does not prolong the time
            self._stop_send_clock()

    def data_received(self, data: bytes) -> None:
        self._crowd.busy(self)
        if self._nobody_waits():
            self._start_clock()
        was_in_body, self._ended = self._in_body, False
        super().data_received(data)
        if was_in_body or self._in_body or self._ended or self.transport.is_closing():
            return  # some of these bytes, or all, were a body's
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_LIMIT_BYTES:
            self.send_400_response("Request line and headers are too large.")

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self._leaving.is_set():
            self.cycle.keep_alive = False
        self._in_body = True
        self._head_bytes = 0
        self._crowd.busy(self)
        self._stop_clock()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False
        self._ended = True
        if self._nobody_waits():
            self._stop_clock()
            self._crowd.idle(self)

    def on_response_complete(self) -> None:
        # First: a pipelined request begins in uvicorn's, and its answer has a time of its own.
        self._half_sent = False
        super().on_response_complete()
        if not self.flow.write_paused:
            self._stop_send_clock()
        if self._nobody_waits() and not self._in_body:
            self._crowd.idle(self)

    def send_400_response(self, msg: str) -> None:
        body = error_body(msg)
        head = (
            b"content-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        )
        self.transport.write(STATUS_LINE[400] + head + body)
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if len(self.tasks) >= self._max_requests:
            app = _too_busy
        super()._start_asgi_task(cycle, app)

    def _nobody_waits(self) -> bool:
        return getattr(self.cycle, "response_complete", True)  # before the first it is None

    def _start_clock(self) -> None:
        if self._clock is None:
            self._clock = self.loop.call_later(HEAD_TIMEOUT_S, self._out_of_time)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _stop_send_clock(self) -> None:
        if self._send_clock is not None:
            self._send_clock.cancel()
            self._send_clock = None

    def _out_of_time(self) -> None:
        self._clock = None
        # Not close(): that waits until a client that does not read has read its answer.
        self.transport.abort()


async def _too_busy(_scope: Scope, _receive: Receive, send: Send) -> None:
    await unavailable(send, "too many requests are under way")


async def unavailable(send: Send, why: str) -> None:
    """Answers with 503. Raises `RuntimeError` if an answer has begun."""
    body = error_body(why)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (HEADER_CODE.encode(), b"unavailable"),
        (b"retry-after", b"1"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
