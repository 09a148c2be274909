"""The placer's cycle: what it does several times a second, and at once when a worker has news."""

from __future__ import annotations

import asyncio
import time

import msgspec
import structlog

from services.placer.apply import Applier
from services.placer.core.plan import Plan, plan
from services.placer.core.verify import verify
from services.placer.core.view import View
from services.placer.knowledge import Knowledge
from services.placer.lease import Lease
from services.placer.metrics import Metrics
from services.placer.observe import Observer
from services.placer.recover import Recovery
from services.placer.scale import Scale
from shared.store.port import TOPIC_REPORTS, Store, StoreUnavailable

log = structlog.get_logger(__name__)

_APART_S = 0.02
"""Between two cycles at least, however many hints come."""
_THREAD_FROM = 500
"""Active models from which a planning would hold up the event loop, and the reflex with it."""


class Cycle:
    """Observe, plan, verify, apply, explain."""

    def __init__(
        self,
        store: Store,
        lease: Lease,
        knowledge: Knowledge,
        observer: Observer,
        applier: Applier,
        recovery: Recovery,
        scale: Scale,
        metrics: Metrics,
        tick_s: float,
    ) -> None:
        self._store = store
        self._lease = lease
        self._knowledge = knowledge
        self._observer = observer
        self._applier = applier
        self._recovery = recovery
        self._scale = scale
        self._metrics = metrics
        self._tick_s = tick_s
        self._news = asyncio.Event()
        self._store_away = False
        self._fence = lease.fence

    async def run(self) -> None:
        """For ever. A store or broker that is away is waited for; what is bound keeps serving."""
        while True:
            began = time.perf_counter()
            self._news.clear()
            try:
                await self.tick()
                self._store_away = False
            except StoreUnavailable as error:
                if not self._store_away:
                    log.warning("store_unavailable", error=str(error))
                self._store_away = True
            self._metrics.tick_seconds.observe(time.perf_counter() - began)
            await asyncio.sleep(_APART_S)
            try:
                async with asyncio.timeout(self._tick_s):
                    await self._news.wait()
            except TimeoutError:
                continue

    async def listen(self) -> None:
        """For ever: lets a worker's news wake the cycle."""
        async for _ in self._store.hints(TOPIC_REPORTS):
            self._news.set()

    async def tick(self) -> None:
        """One cycle. Raises `StoreUnavailable`."""
        knowledge = self._knowledge
        # 1. Observe: reports of all workers, depths of the queues of which only the broker knows.
        asked_at = knowledge.clock()
        if self._fence != self._lease.fence:  # the store forgot the lease: what else?
            await self._recovery.check_epoch()
            self._fence = self._lease.fence
        reports = await self._recovery.complete(await self._observer.reports())
        knowledge.see(reports, await self._observer.depths(knowledge), asked_at)
        if not self._lease.valid:
            return
        # 2. Plan: who is to consume what. A large fleet's planning leaves the reflex its loop.
        decided = await self._plan(knowledge.view())
        # 3. Verify against what has happened meanwhile.
        verified, refused = verify(decided, knowledge.view())
        if self._recovery.in_grace:
            # Who has not reported yet may be alive: nothing is taken from anybody.
            verified = verified.additions()
        # 4. Apply: it is wanted from here on, and written as far as store and broker allow.
        knowledge.commit(verified)
        await self._applier.follow()
        # 5. Explain, and say how large the fleet should be.
        knowledge.remember(msgspec.structs.replace(verified, refused=(*decided.refused, *refused)))
        self._tell(verified)

    async def _plan(self, view: View) -> Plan:
        began = time.perf_counter()
        policy = self._knowledge.policy
        if len(view.models) < _THREAD_FROM:
            decided = plan(view, policy)
        else:
            decided = await asyncio.to_thread(plan, view, policy)
        self._metrics.plan_seconds.observe(time.perf_counter() - began)
        return decided

    def _tell(self, verified: Plan) -> None:
        if verified.changes:
            log.info("plan_applied", plan=str(verified)[:2000])
        metrics, knowledge = self._metrics, self._knowledge
        metrics.evictions.inc(sum(gone.reason.startswith("makes room") for gone in verified.unbind))
        metrics.workers.set(len(knowledge.reports))
        metrics.active.set(len(knowledge.active))
        self._scale.publish(verified.wanted)
