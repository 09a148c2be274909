"""Follows the placer's word. A lost hint does no harm: the assignment is read again anyway, and
while the store is away the last one stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from services.worker.core.events import Assigned
from shared.control import Assignment
from shared.store.port import Store, StoreUnavailable, topic_assignment

log = structlog.get_logger(__name__)


class Follower:
    """Tells `Assigned` for each new assignment of `worker`, never for an older one."""

    def __init__(
        self,
        store: Store,
        worker: str,
        tell: Callable[[Assigned], None],
        *,
        reread_s: float = 2.0,
    ) -> None:
        self._store = store
        self._worker = worker
        self._tell = tell
        self._reread_s = reread_s
        self._hinted = asyncio.Event()
        self._last: Assignment | None = None
        self._away = False

    async def listen(self) -> None:
        """For ever: hints into wake-ups."""
        async for _ in self._store.hints(topic_assignment(self._worker)):
            self._hinted.set()

    async def follow(self) -> None:
        """For ever: reads at each hint, and every `reread_s`."""
        while True:
            self._hinted.clear()
            await self._read()
            try:
                async with asyncio.timeout(self._reread_s):
                    await self._hinted.wait()
            except TimeoutError:
                continue

    async def _read(self) -> None:
        try:
            assignment = await self._store.assignment(self._worker)
        except StoreUnavailable as error:
            if not self._away:
                log.warning("assignment_unreadable", error=str(error))
            self._away = True
            return
        self._away = False
        if assignment is None or not self._is_news(assignment):
            return
        self._last = assignment
        log.info(
            "assigned",
            generation=assignment.generation,
            models=len(assignment.models),
            drain=assignment.drain,
        )
        models = tuple(entry.model for entry in assignment.models)
        self._tell(
            Assigned(
                models,
                assignment.fence,
                assignment.generation,
                drain=assignment.drain,
                shares=assignment.shares,
            )
        )

    def _is_news(self, assignment: Assignment) -> bool:
        last = self._last
        if last is None:
            return True
        return (assignment.fence, assignment.generation) > (last.fence, last.generation)
