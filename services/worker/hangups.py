"""Hears from gateways whose clients have hung up: those requests are not run any more.

What is taken from a queue after the note is refused on arrival. What the core holds already
(prefetch is about two batches) still runs.
"""

from __future__ import annotations

import time

from shared.cancels import CancelledRequests
from shared.store.port import TOPIC_CANCELLED, Store


class Hangups:
    def __init__(self, store: Store, cancelled: CancelledRequests) -> None:
        self._store = store
        self._cancelled = cancelled

    async def listen(self) -> None:
        """For ever."""
        async for data in self._store.notes(TOPIC_CANCELLED):
            self._cancelled.note(data, int(time.time() * 1000))
