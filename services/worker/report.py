"""Heartbeats: the whole truth every quarter of a second, and at once when it cannot wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from shared.control import Report
from shared.store.port import TOPIC_REPORTS, Store, StoreUnavailable

log = structlog.get_logger(__name__)

_APART_S = 0.02
"""Between two reports with news: a burst of it is one report."""


class Reporter:
    """Sends what `make` says."""

    def __init__(
        self,
        store: Store,
        make: Callable[[], Report],
        *,
        interval_s: float,
        ttl_s: float,
        on_sent: Callable[[Report], None] | None = None,
    ) -> None:
        self._store = store
        self._make = make
        self._interval_s = interval_s
        self._ttl_s = ttl_s
        self._on_sent = on_sent
        self._news = asyncio.Event()
        self._away = False

    def news(self) -> None:
        """The next report should not wait."""
        self._news.set()

    async def run(self) -> None:
        """For ever. A store that is away is tried again at the next heartbeat."""
        while True:
            urgent = self._news.is_set()
            self._news.clear()
            began = time.monotonic()
            await self._send(urgent=urgent)
            await asyncio.sleep(max(0.0, _APART_S - (time.monotonic() - began)))
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._news.wait()
            except TimeoutError:
                continue

    async def _send(self, *, urgent: bool) -> None:
        report = self._make()
        try:
            await self._store.put_report(report, self._ttl_s)
            if urgent:
                await self._store.hint(TOPIC_REPORTS)
        except StoreUnavailable as error:
            if not self._away:
                log.warning("report_unsent", error=str(error))
            self._away = True
            self._news.set()  # what was news is still unknown to the placer
            await asyncio.sleep(self._interval_s)
            return
        self._away = False
        if self._on_sent is not None:
            self._on_sent(report)
