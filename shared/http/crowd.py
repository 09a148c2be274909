"""How many connections are open at once, and which of them makes way for another."""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import time
from typing import Final, Protocol

import structlog

log = structlog.get_logger(__name__)

_OTHER_FILES: Final = 256
"""That a service may need open beside its connections: uploads, the broker, the store."""
REFUSALS_LOGGED_S: Final = 10.0
"""A log line tells of the connections refused in so long: any client can provoke them."""


class Connection(Protocol):
    """What has a transport to be aborted."""

    transport: asyncio.Transport


class Crowd:
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


def openable(wanted: int) -> int:
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
