"""The server from begin to end: what it listens on, and who is still answered as it stops."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Callable, Iterator
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from shared.http.crowd import Crowd, openable
from shared.http.handshake import Failures, Handshake
from shared.http.protocol import Config, HttpProtocol, unavailable
from shared.tls import Identity, ServerTls

KEEP_ALIVE_S: Final = 75
"""Longer than the idle time of usual proxies (60 s): else they send on closing connections."""
BACKLOG: Final = 2048


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
    config = Config(
        _told_at_the_end(app),
        crowd=Crowd(openable(max_connections)),
        max_requests=max_requests,
        leaving=leaving or stop,
        http=HttpProtocol if identity is None else _secured(identity),
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


def _secured(identity: Identity) -> Callable[..., asyncio.Protocol]:
    """Makes what uvicorn has made for each connection: a handshake, then its own protocol."""
    failures = Failures()

    def begin(config: Config, server_state: ServerState, **options: Any) -> asyncio.Protocol:
        return Handshake(
            identity,
            config.crowd,
            failures,
            # Among these uvicorn closes them when it ends.
            server_state.connections,  # type: ignore[arg-type]
            lambda: HttpProtocol(config, server_state, **options),
        )

    return begin


def _told_at_the_end(app: ASGIApp) -> ASGIApp:
    """A request is only cancelled when the server has no more time for it."""

    async def told(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            with contextlib.suppress(RuntimeError):  # its answer has begun
                await unavailable(send, "the service is stopping")

    return told


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
