"""Looks after job files: removes old ones, and brings back jobs that their queue has lost.

Every gateway does it, one folder at a time at moments of its own; doing it twice does no harm.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Final

import structlog

from services.gateway.config import GatewayConfig
from services.gateway.core.jobs import (
    PUBLISH_AT_ONCE,
    SHARDS,
    WAIT_MOST_S,
    Note,
    Sweep,
    queue_of,
    sweep,
)
from services.gateway.jobs.files import JobFiles
from services.gateway.jobs.jobs import publish_note
from services.gateway.jobs.keys import JobKeys
from shared.broker.port import Broker, QueueFull, QueueMissing, Unroutable
from shared.errors import RoostError, Unavailable

log = structlog.get_logger(__name__)

PAUSE_S: Final = 15.0
"""Between two folders, on average: with eight of them, each is looked through every two minutes."""
_REMOVE_AT_ONCE: Final = 2000
_SLACK_S: Final = 60.0
"""More than any turn takes beyond its deadline."""


class JobSweep:
    def __init__(self, config: GatewayConfig, broker: Broker, files: JobFiles) -> None:
        self._broker = broker
        self._files = files
        self._keys = JobKeys(files, config.job_keep_s)
        self._keep_s = config.job_keep_s
        self._longest_s = config.job_max_timeout_s
        self._turn_s = config.max_timeout_s + WAIT_MOST_S + _SLACK_S
        self._publish_timeout_s = config.publish_timeout_s

    async def run(self) -> None:
        """Never returns."""
        first = random.randrange(SHARDS)  # noqa: S311  (spreads load, guards no secret)
        for step in itertools.count(first):
            await asyncio.sleep(PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                await self.look(str(step % SHARDS))
            except RoostError as error:
                log.warning("job_sweep_failed", error=str(error))
            except Exception:
                log.exception("job_sweep_failed")

    async def look(self, shard: str) -> None:
        """Looks through one folder. Raises `Unavailable`."""
        found = await asyncio.to_thread(self._files.list, shard)
        plan = sweep(found, keep_s=self._keep_s, turn_s=self._turn_s, longest_s=self._longest_s)
        await asyncio.to_thread(self._clean, plan)
        if plan.quiet and await self._waiting(shard) == 0:
            await self._bring_back(plan.quiet[:PUBLISH_AT_ONCE])

    def _clean(self, plan: Sweep) -> None:
        for id_ in plan.over[:_REMOVE_AT_ONCE]:
            self._files.remove(id_)
        for id_ in plan.settled:
            self._files.remove_request(id_)
        for id_ in plan.locks:
            self._files.unlock(id_)
        for name in plan.keys[:_REMOVE_AT_ONCE]:
            self._keys.holder(name)  # frees it

    async def _waiting(self, shard: str) -> int | None:
        try:
            return await self._broker.depth(queue_of(shard))
        except QueueMissing:
            return None

    async def _bring_back(self, ids: list[str]) -> None:
        log.warning("jobs_brought_back", count=len(ids))
        for id_ in ids:
            try:
                await publish_note(self._broker, Note(id_), self._publish_timeout_s)
            except (QueueFull, Unroutable, Unavailable) as error:
                log.info("job_not_brought_back", error=str(error))
                return
            await asyncio.to_thread(self._files.touch, id_)
