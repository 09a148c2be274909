"""What a worker says over HTTP: its metrics, and whether it serves.

Threads answer, not the event loop: a loop that hangs writes no reports, and that must be told.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry

from services.worker.bounded import BoundedServer
from shared.auth import LOOK_S, Gate, challenge
from shared.broker.port import Broker
from shared.control import Report
from shared.errors import RoostError, Unavailable
from shared.nvmetrics import encoder
from shared.tls import HANDSHAKE_TIMEOUT_S, Identity, ServerTls

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


class Readiness:
    """A worker is ready while the placer knows, by a fresh report, of an engine that is up, and
    the broker brings requests and takes answers."""

    def __init__(
        self, broker: Broker, ttl_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        """`ttl_s`: how long the store keeps a report."""
        self._broker = broker
        self._ttl_s = ttl_s
        self._now = now
        self._last: tuple[float, bool] | None = None
        """When the last report was written, and whether the engine was up."""

    def sent(self, report: Report) -> None:
        """The store has it."""
        self._last = (self._now(), report.engine_up)

    def missing(self) -> list[str]:
        """What it waits for; nothing when it is ready."""
        last = self._last
        fresh = last is not None and self._now() - last[0] <= self._ttl_s
        waits = {
            "the message broker": not self._broker.connected,
            "a report to be written": not fresh,
            "the engine": last is None or not last[1],
        }
        return [what for what, missing in waits.items() if missing]


@contextlib.contextmanager
def serving(
    host: str,
    port: int,
    registry: CollectorRegistry,
    readiness: Readiness,
    tls: ServerTls | None = None,
    door: Door | None = None,
) -> Iterator[int]:
    """Serves `/metrics` and `/readyz` inside the block, on the port that it gives: another one
    than asked for where that is 0. Raises `OSError` if it cannot listen, `TlsError` for files
    that cannot be used."""
    identity = None if tls is None else Identity(tls)
    family = _Server6 if ":" in host else _Server
    app = _app(registry, readiness, door)
    with make_server(host, port, app, family, _Handler) as server:
        assert isinstance(server, _Server)
        server.identity = identity
        thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class Door:
    """Lets in who may read metrics. Threads ask it; keys are looked for when somebody asks."""

    def __init__(self, gate: Gate, now: Callable[[], float] = time.monotonic) -> None:
        self._gate = gate
        self._now = now
        self._lock = threading.Lock()
        self._looked_at = -math.inf

    def check(self, authorization: str | None) -> None:
        """Raises `Unauthenticated`, `PermissionDenied`; `Unavailable` while keys cannot be read."""
        with self._lock:
            if self._now() - self._looked_at >= LOOK_S:
                self._looked_at = self._now()
                with contextlib.suppress(Unavailable):  # what was known is believed for a while
                    self._gate.look()
            self._gate.check(None if authorization is None else authorization.encode(), "metrics")


def _app(registry: CollectorRegistry, readiness: Readiness, door: Door | None) -> WSGIApplication:
    def app(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/readyz":
            try:
                if door is not None:
                    door.check(environ.get("HTTP_AUTHORIZATION"))
            except RoostError as error:
                respond(_STATUS[error.code], _headers(error))
                return [json.dumps({"error": error.message}).encode()]
            encode, content_type = encoder(environ.get("HTTP_ACCEPT", ""))
            text = encode(registry)
            respond("200 OK", [("Content-Type", content_type)])
            return [text]
        missing = readiness.missing()
        said = f"waits for {' and '.join(missing)}" if missing else "ready"
        respond(
            "503 Service Unavailable" if missing else "200 OK",
            [("Content-Type", "application/json")],
        )
        return [json.dumps({"status": said}).encode()]

    return app


_STATUS: Final = {
    "unauthenticated": "401 Unauthorized",
    "permission_denied": "403 Forbidden",
    "unavailable": "503 Service Unavailable",
}


def _headers(error: RoostError) -> list[tuple[str, str]]:
    challenged = challenge(error)
    headers = [("Content-Type", "application/json")]
    return headers if challenged is None else [*headers, ("WWW-Authenticate", challenged)]


class _Server(BoundedServer):
    identity: Identity | None = None
    """None: plain text."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.identity is None:
            super().finish_request(request, client_address)
            return
        # In the connection's own thread: a slow handshake keeps nobody waiting.
        request.settimeout(HANDSHAKE_TIMEOUT_S)
        try:
            secured = self.identity.current().wrap_socket(request, server_side=True)
        except OSError:  # SSLError and TimeoutError are ones; any client can provoke them
            return
        self.became(request, secured)
        with secured:
            super().finish_request(secured, client_address)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10.0
    """Seconds that a client may say nothing: each holds a thread."""

    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is no news."""
