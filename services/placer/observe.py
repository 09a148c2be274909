"""What the placer looks at in each cycle: reports from the store, depths from the broker.

The cost is that of what is active, never of what is registered, and bounded besides: only the
broker knows what waits where a consumer's window is full or nobody consumes, and only there it
is asked, so many queues at a look (ADR 0012).
"""

from __future__ import annotations

import asyncio

import structlog

from services.placer.core.depths import DepthQuestions
from services.placer.knowledge import Knowledge
from services.placer.looks import unclear
from services.placer.metrics import Metrics
from shared.broker.port import Broker, BrokerUnavailable
from shared.control import Report
from shared.errors import RoostError
from shared.names import ModelId, model_queue
from shared.store.port import Store

log = structlog.get_logger(__name__)

_TIMEOUT_S = 2.0


class Observer:
    """Asks the store and the broker."""

    def __init__(
        self, broker: Broker, store: Store, metrics: Metrics, *, concurrency: int, limit: int
    ) -> None:
        """`concurrency`: questions to the broker at once; `limit`: in one look."""
        self._broker = broker
        self._store = store
        self._metrics = metrics
        self._room = asyncio.Semaphore(concurrency)
        self._questions = DepthQuestions(limit)

    async def reports(self) -> list[Report]:
        """Raises `StoreUnavailable`."""
        return await self._store.reports()

    async def epoch(self) -> str:
        """Raises `StoreUnavailable`."""
        return await self._store.epoch()

    async def depths(self, knowledge: Knowledge) -> dict[ModelId, int]:
        """Requests that wait in queues of which only the broker knows, the most urgent of them:
        by its count of messages and what those hold on average. What could not be asked is left
        out."""
        found: dict[ModelId, int] = {}
        if not self._broker.connected:
            return found
        urgent, others = unclear(knowledge)
        asked = self._questions.choose(urgent, others)
        self._metrics.depth_questions.inc(len(asked))
        self._metrics.depths_put_off.set(len(urgent) + len(others) - len(asked))
        async with asyncio.TaskGroup() as group:
            for model in asked:
                group.create_task(self._depth(model, found))
        return {
            model: round(messages * knowledge.requests_per_message(model))
            for model, messages in found.items()
        }

    async def depth(self, model: ModelId) -> int | None:
        """Ready messages; None when there is no such queue. Raises `BrokerUnavailable`."""
        async with self._room, asyncio.timeout(_TIMEOUT_S):
            return await self._broker.depth(model_queue(model))

    async def _depth(self, model: ModelId, found: dict[ModelId, int]) -> None:
        try:
            found[model] = await self.depth(model) or 0
        except (BrokerUnavailable, TimeoutError):
            return
        except RoostError as error:
            log.warning("depth_unknown", model=model, error=str(error))
