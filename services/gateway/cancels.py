"""Tells workers whose clients have hung up, so that those requests keep off the devices."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

from services.gateway.metrics import Metrics
from shared.cancels import MAX_NOTE, Cancelled, encode
from shared.store.port import TOPIC_CANCELLED, Store, StoreUnavailable

_GATHER_S: Final = 0.005
"""Clients often hang up together (their own gateway died, say): one note for all of them."""


class Cancels:
    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._untold: deque[Cancelled] = deque(maxlen=100 * MAX_NOTE)
        self._any = asyncio.Event()

    def add(self, correlation_id: str, deadline: float) -> None:
        """`deadline` is on the event loop's clock, in seconds."""
        left_s = deadline - asyncio.get_running_loop().time()
        self._untold.append(Cancelled(correlation_id, int((time.time() + left_s) * 1000)))
        self._any.set()

    async def tell(self) -> None:
        """Never returns. What cannot be told now is dropped: soon it would help nobody."""
        while True:
            await self._any.wait()
            await asyncio.sleep(_GATHER_S)
            self._any.clear()
            while self._untold:
                told = [self._untold.popleft() for _ in range(min(len(self._untold), MAX_NOTE))]
                try:
                    await self._store.note(TOPIC_CANCELLED, encode(told))
                except StoreUnavailable:
                    self._untold.clear()
                else:
                    self._metrics.cancelled.inc(len(told))
