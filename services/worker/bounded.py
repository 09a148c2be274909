"""A small HTTP server of threads that clients cannot hold up: so many connections at once, and so
long for each of them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIServer

MAX_CONNECTIONS: Final = 32
"""At once: a scraper or two, probes, and somebody who looks. More are closed unheard."""
CONNECTION_S: Final = 15.0
"""From accepting a connection to the last byte of its one answer."""


class BoundedServer(ThreadingMixIn, WSGIServer):
    """Each connection holds a thread, and brings one request."""

    daemon_threads = True

    def server_activate(self) -> None:
        self._open: dict[Any, tuple[float, socket.socket]] = {}
        """By connection: until when it may last (monotonic), and its socket as it is now."""
        self._lock = threading.Lock()
        super().server_activate()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        del client_address
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                return False
            self._open[request] = time.monotonic() + CONNECTION_S, request
            return True

    def became(self, request: Any, sock: socket.socket) -> None:
        """The connection goes on over this socket, which took its descriptor (TLS)."""
        with self._lock:
            if request in self._open:
                self._open[request] = self._open[request][0], sock

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second: a client that says or takes a byte now and then is cut off as well. Its
        thread wakes up with an error, and closes the connection."""
        now = time.monotonic()
        with self._lock:
            for until, sock in self._open.values():
                if now > until:
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went, or was cut off: anybody can provoke that, as often as they like."""
