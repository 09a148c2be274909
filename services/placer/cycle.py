"""The placer's cycle: what it does several times a second, and at once when a worker has news."""

from __future__ import annotations

import asyncio
import time

import msgspec
import structlog

from services.placer.apply import Applier
from services.placer.core.plan import Plan, plan, relieve
from services.placer.core.verify import verify
from services.placer.core.view import View
from services.placer.knowledge import Knowledge
from services.placer.lease import Lease
from services.placer.looks import next_look_s
from services.placer.metrics import Metrics
from services.placer.observe import Observer
from services.placer.record import Recorder
from services.placer.recover import Recovery
from services.placer.scale import Scale
from services.placer.sizes import Sizes
from shared.names import ModelId
from shared.store.port import TOPIC_REPORTS, Store, StoreUnavailable

log = structlog.get_logger(__name__)

_APART_S = 0.02
"""Between two cycles at least, however many hints come; and as long as the last one took, so that
a large fleet's news leaves half of the time to the reflex."""
_RELIEVED_AT_ONCE = 8
"""Models that get a copy before the rest is looked at; more are the plan's."""
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
        sizes: Sizes,
        scale: Scale,
        metrics: Metrics,
        tick_s: float,
        recorder: Recorder | None = None,
    ) -> None:
        self._store = store
        self._lease = lease
        self._knowledge = knowledge
        self._observer = observer
        self._applier = applier
        self._recovery = recovery
        self._sizes = sizes
        self._scale = scale
        self._metrics = metrics
        self._tick_s = tick_s
        self._recorder = recorder
        self._news = asyncio.Event()
        self._next_s = tick_s
        self._store_away = False
        self._starved: set[ModelId] = set()
        """Models that did not keep up at the last look."""
        self._fence = lease.fence

    async def run(self) -> None:
        """For ever. A store or broker that is away is waited for; what is bound keeps serving."""
        while True:
            began = time.perf_counter()
            self._next_s = self._tick_s
            self._news.clear()
            try:
                await self.tick()
                self._store_away = False
            except StoreUnavailable as error:
                if not self._store_away:
                    log.warning("store_unavailable", error=str(error))
                self._store_away = True
            took = time.perf_counter() - began
            self._metrics.tick_seconds.observe(took)
            await asyncio.sleep(min(max(_APART_S, took), self._tick_s))
            try:
                async with asyncio.timeout(self._next_s):
                    await self._news.wait()
            except TimeoutError:
                continue

    def wake(self) -> None:
        """Somebody wants something that should not wait for the next tick."""
        self._news.set()

    async def listen(self) -> None:
        """For ever: lets a worker's news wake the cycle."""
        async for _ in self._store.hints(TOPIC_REPORTS):
            self._news.set()

    async def tick(self) -> None:
        """One cycle. Raises `StoreUnavailable`."""
        knowledge, began = self._knowledge, time.perf_counter()
        # 1. Observe: reports of all workers, then depths of the queues of which, as they say,
        #    only the broker knows.
        asked_at = knowledge.clock()
        if self._fence != self._lease.fence:  # the store forgot the lease: what else?
            await self._recovery.check_epoch()
            self._fence = self._lease.fence
        reports = await self._recovery.complete(await self._observer.reports())
        knowledge.see(reports, {}, asked_at)
        await self._sizes.complete()
        await self._relieve(began)
        depths_at = knowledge.clock()
        depths = await self._observer.depths(knowledge)
        knowledge.see_depths(depths, depths_at)
        # What waits too long is looked at before the next tick.
        self._next_s = min(self._next_s, next_look_s(knowledge, depths))
        if self._recorder is not None:
            self._recorder.observe(knowledge, depths)
        if not self._lease.valid:
            return
        # 2. Plan: who is to consume what. A large fleet's planning leaves the reflex its loop.
        view, version = knowledge.view(), knowledge.version
        decided = await self._plan(view)
        # 3. Verify against what has happened meanwhile.
        fresh = view if knowledge.version == version else knowledge.view()
        verified, refused = verify(decided, fresh)
        if self._recovery.in_grace:
            # Who has not reported yet may be alive: nothing is taken from anybody.
            verified = verified.additions()
        # 4. Apply: it is wanted from here on, and written as far as store and broker allow.
        relieved = sum(self._starves(new.model) for new in verified.bind)
        knowledge.commit(verified)
        await self._applier.write()
        self._relieved(relieved, began)
        await self._applier.route()
        await self._applier.retire()
        # 5. Explain, and say how large the fleet should be.
        knowledge.remember(msgspec.structs.replace(verified, refused=(*decided.refused, *refused)))
        self._tell(verified)

    async def _relieve(self, began: float) -> None:
        """What does not keep up gets its next copy before anything else is asked or planned: the
        rest of a cycle costs what the whole fleet does."""
        knowledge = self._knowledge
        starving = [m for m in sorted(knowledge.saturated - self._starved) if self._starves(m)]
        self._starved = set(knowledge.saturated)
        if not starving or not self._lease.valid or self._recovery.in_grace:
            return
        decided = relieve(knowledge.view(), starving[:_RELIEVED_AT_ONCE], knowledge.policy)
        if not decided.changes:
            return
        log.info("relieved", plan=str(decided)[:2000])
        touched = knowledge.commit(decided)
        await self._applier.write(touched)
        self._metrics.evictions.inc(len(decided.unbind))
        self._relieved(len(decided.bind), began)

    def _relieved(self, copies: int, began: float) -> None:
        took = time.perf_counter() - began
        for _ in range(copies):
            self._metrics.reflex_seconds.labels("starving").observe(took)

    async def _plan(self, view: View) -> Plan:
        began = time.perf_counter()
        policy = self._knowledge.policy
        if len(view.models) < _THREAD_FROM:
            decided = plan(view, policy)
        else:
            decided = await asyncio.to_thread(plan, view, policy)
        self._metrics.plan_seconds.observe(time.perf_counter() - began)
        return decided

    def _starves(self, model: ModelId) -> bool:
        """Whether it has a worker, and that does not keep up: its window is full, it is gone
        while something waits, or the queue was not empty at two looks."""
        knowledge = self._knowledge
        active = knowledge.active.get(model)
        if active is None or not knowledge.copies(model):
            return False
        waits = active.waiting_at is not None or active.backlog_since is not None
        return waits or model in knowledge.saturated

    def _tell(self, verified: Plan) -> None:
        if verified.changes:
            log.info("plan_applied", plan=str(verified)[:2000])
        metrics, knowledge = self._metrics, self._knowledge
        metrics.put_off.set(len(verified.pace.put_off))
        if verified.pace.unfinished:
            self._next_s = 0.0  # the rest has its turn at once
        metrics.evictions.inc(sum(gone.reason.startswith("makes room") for gone in verified.unbind))
        metrics.workers.set(len(knowledge.reports))
        metrics.active.set(len(knowledge.active))
        metrics.leaving.set(len(knowledge.leaving))
        staying = len(knowledge.reports) - len(knowledge.leaving)
        self._scale.publish(verified.wanted, staying, certain=not self._recovery.in_grace)
