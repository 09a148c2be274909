"""What a worker says over HTTP: its metrics, and whether it serves.

Threads answer, not the event loop: a loop that hangs writes no reports, and that must be told.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry

from shared.broker.port import Broker
from shared.control import Report
from shared.nvmetrics import encoder

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
    host: str, port: int, registry: CollectorRegistry, readiness: Readiness
) -> Iterator[int]:
    """Serves `/metrics` and `/readyz` inside the block, on the port that it gives: another one
    than asked for where that is 0. Raises `OSError` if it cannot listen."""
    family = _Server6 if ":" in host else _Server
    app = _app(registry, readiness)
    with make_server(host, port, app, family, _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _app(registry: CollectorRegistry, readiness: Readiness) -> WSGIApplication:
    def app(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/readyz":
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


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10.0
    """Seconds that a client may say nothing: each holds a thread."""

    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is no news."""
