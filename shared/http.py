"""An HTTP server inside a running event loop: uvicorn without its signals, with what it lacks
against slow and greedy clients. Only HTTP services import this (it needs their extras)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import structlog
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from shared.https import Connection, Failures, Gate
from shared.names import HEADER_CODE
from shared.nvmetrics import encoder
from shared.tls import Identity, ServerTls
from shared.v2 import error_body

log = structlog.get_logger(__name__)

HEAD_TIMEOUT_S: Final = 10.0
"""From the first byte of a request (or the connection's begin) to the end of its headers; also
how long the rest of a body is read whose answer has already gone out."""
SEND_TIMEOUT_S: Final = 30.0
"""From when a client is found to read more slowly than it is answered, until it has the answer."""
HEAD_LIMIT_BYTES: Final = 64 * 1024
"""Request line and headers; one read of the socket more may be held."""
KEEP_ALIVE_S: Final = 75
"""Longer than the idle time of usual proxies (60 s): else they send on closing connections."""
BACKLOG: Final = 2048
_OTHER_FILES: Final = 256
"""That a service may need open beside its connections: uploads, the broker, the store."""
REFUSALS_LOGGED_S: Final = 10.0
"""A log line tells of the connections refused in so long: any client can provoke them."""


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    stop: asyncio.Event,
    on_started: Callable[[int], None] | None = None,
    *,
    grace_s: float = 10.0,
    max_connections: int = 16384,
    max_requests: int = 4096,
    tls: ServerTls | None = None,
    leaving: asyncio.Event | None = None,
) -> None:
    """Serves until `stop` is set; then takes no more connections, lets running requests finish
    for `grace_s`, answers the rest with 503 and returns. Cancelled itself, it drops everything at
    once. While `leaving` is set, before `stop`, it serves as before, but each answer is the last
    of its connection: so clients go elsewhere by themselves, and find no connection closed.

    `port` 0 takes a free one; `on_started` is told the real one, when connections are taken.
    Beyond `max_connections` (or what the process may open) a new connection takes the place of
    the one that has been idle for longest, and is closed at once when none is idle. Beyond
    `max_requests` running ones a request is answered with 503. The app's lifespan is not run:
    a service's parts are begun and ended in its `app.py`. With `tls` nothing else is spoken.
    Raises `OSError` if it cannot listen, `TlsError` for files that cannot be used.
    """
    identity = None if tls is None else Identity(tls)
    listener = _listen(host, port)
    config = _Config(
        _told_at_the_end(app),
        crowd=_Crowd(_openable(max_connections)),
        max_requests=max_requests,
        leaving=leaving or stop,
        http=_Protocol if identity is None else _gate(identity),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        # Below that it tells what any client can provoke at will: a flood for our logs.
        log_level="error",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(grace_s),
        backlog=BACKLOG,
    )
    bound: int = listener.getsockname()[1]
    server = _Server(config, lambda: on_started(bound) if on_started else None)
    watcher = asyncio.create_task(server.exit_when(stop), name="http-stop")
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()
        await server.abandon()
        listener.close()


def metrics_route(registry: CollectorRegistry) -> Route:
    """`GET /metrics`, as Prometheus or OpenMetrics text, whichever is asked for."""

    # Not async: Starlette then runs it in a thread, and thousands of models' series do not
    # hold up the event loop.
    def metrics(request: Request) -> Response:
        encode, content_type = encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    return Route("/metrics", metrics, methods=["GET"])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server(
        (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=host == "::"
    )
    # Inherited by connections. asyncio sets it itself, but not for sockets made elsewhere; without
    # it the body of an answer waits for the client's delayed acknowledgement of its head (40 ms).
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    return listener


def _openable(wanted: int) -> int:
    """How many of the wanted connections there can be, with some files left for other purposes.
    The process's own limit is raised as far as it may be: usual is one of 1,024, kept low for the
    sake of select(), which nothing here calls."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    useful = wanted + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        useful = min(useful, hard)
    if soft != resource.RLIM_INFINITY and soft < useful:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (useful, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    possible = max(soft - _OTHER_FILES, soft // 2)
    if possible < wanted:
        log.info("open_files_limit", limit=soft, connections=possible, wanted=wanted)
    return min(possible, wanted)


class _Crowd:
    """Bounds the open connections, and knows which of them are idle: no request is being read
    or served (its answer may still wait for the client). Idle ones never keep others out."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the longest idle first
        self._refused = 0
        self._told_at = -math.inf

    def enter(self, connection: Connection) -> bool:
        """Whether there is room for one more, if need be in an idle one's place."""
        if len(self._open) >= self._limit:
            victim = next(iter(self._idle), None)
            if victim is None:
                self._refuse()
                return False
            self.leave(victim)
            victim.transport.abort()
        self._open.add(connection)
        self._idle[connection] = None
        return True

    def leave(self, connection: Connection) -> None:
        """It is closed, or about to be. Idempotent."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def busy(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        if connection in self._open:
            self._idle[connection] = None

    def _refuse(self) -> None:
        self._refused += 1
        now = time.monotonic()
        if now - self._told_at >= REFUSALS_LOGGED_S:
            log.warning("connections_refused", count=self._refused, limit=self._limit)
            self._refused = 0
            self._told_at = now


class _Config(uvicorn.Config):
    def __init__(
        self,
        app: ASGIApp,
        *,
        crowd: _Crowd,
        max_requests: int,
        leaving: asyncio.Event,
        **options: Any,
    ) -> None:
        # Not uvicorn's own limit: that counts idle connections against everybody's requests.
        super().__init__(app, **options)
        self.crowd = crowd
        self.max_requests = max_requests
        self.leaving = leaving


def _gate(identity: Identity) -> Callable[..., asyncio.Protocol]:
    """Makes what uvicorn has made for each connection: a handshake, then its own protocol."""
    failures = Failures()

    def gate(config: _Config, server_state: ServerState, **options: Any) -> asyncio.Protocol:
        return Gate(
            identity,
            config.crowd,
            failures,
            # Among these uvicorn closes them when it ends.
            server_state.connections,  # type: ignore[arg-type]
            lambda: _Protocol(config, server_state, **options),
        )

    return gate


def _told_at_the_end(app: ASGIApp) -> ASGIApp:
    """A request is only cancelled when the server has no more time for it."""

    async def told(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            with contextlib.suppress(RuntimeError):  # its answer has begun
                await _unavailable(send, "the service is stopping")

    return told


async def _too_busy(_scope: Scope, _receive: Receive, send: Send) -> None:
    await _unavailable(send, "too many requests are under way")


async def _unavailable(send: Send, why: str) -> None:
    body = error_body(why)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (HEADER_CODE.encode(), b"unavailable"),
        (b"retry-after", b"1"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the service's

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    async def exit_when(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.should_exit = True

    async def abandon(self) -> None:
        """Ends whatever is left, and waits for it. Nothing is, after an orderly shutdown."""
        for server in getattr(self, "servers", []):
            server.close()
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)


class _Protocol(HttpToolsProtocol):
    """uvicorn bounds neither the time nor the bytes of a request's head, and lets idle
    connections count as load; here heads are bounded, connections and requests apart.

    A *cycle* is uvicorn's word for a request whose headers are complete. The clock runs while
    the connection gives bytes that no cycle waits for; an idle keep-alive connection is
    uvicorn's to close.
    """

    def __init__(self, config: _Config, *args: Any, **kwargs: Any) -> None:
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
