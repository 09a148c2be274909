"""Hears from gateways whose clients have hung up: those requests are not run any more.

What is held already and does not run yet is told to the core; what comes from a queue after the
note is refused on arrival (items.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from services.worker.core.events import Fact, ItemCancelled
from services.worker.items import Items
from shared.store.port import TOPIC_CANCELLED, Store


class Hangups:
    def __init__(self, store: Store, items: Items, tell: Callable[[Fact], None]) -> None:
        self._store = store
        self._items = items
        self._tell = tell

    async def listen(self) -> None:
        """For ever."""
        async for data in self._store.notes(TOPIC_CANCELLED):
            named = self._items.cancelled.note(data, int(time.time() * 1000))
            for item in self._items.of_requests(frozenset(named)):
                self._tell(ItemCancelled(item))
