"""Taking over: from an earlier placer, from an earlier life, or from nothing when the store
lost its content. What runs is left running: desired state is rebuilt from what there is.
"""

from __future__ import annotations

import asyncio

import structlog

from services.placer.apply import Applier
from services.placer.core.plan import Retire
from services.placer.knowledge import Knowledge
from services.placer.observe import Observer
from shared.broker.port import Broker
from shared.catalog import Catalog
from shared.control import Report
from shared.errors import ModelNotFound, RoostError
from shared.models import Manifest
from shared.names import ModelId, model_queue, split_model_id
from shared.store.port import Store, StoreUnavailable

log = structlog.get_logger(__name__)

_AT_ONCE = 4
"""Queues looked for at the same time: it is not urgent."""
_ONE_BY_ONE = 100
"""Up to so many manifests are read one by one, beyond it all that there are in one pass."""


class Recovery:
    """Knows which workers and which store this placer has met."""

    def __init__(
        self,
        broker: Broker,
        store: Store,
        catalog: Catalog,
        knowledge: Knowledge,
        observer: Observer,
        applier: Applier,
        grace_s: float,
    ) -> None:
        self._broker = broker
        self._store = store
        self._catalog = catalog
        self._knowledge = knowledge
        self._observer = observer
        self._applier = applier
        self._grace_s = grace_s
        self._grace_until = 0.0
        self._epoch = ""
        self.store_was_empty = False

    @property
    def in_grace(self) -> bool:
        """Workers may be alive that have not reported yet."""
        return self._knowledge.clock() < self._grace_until

    async def begin(self) -> None:
        """At the begin of a term: what earlier placers made active is active. Raises
        `StoreUnavailable`."""
        self._epoch = await self._store.epoch()
        self._grace_until = self._knowledge.clock() + self._grace_s
        stored = await self._store.active()
        self.store_was_empty = not stored
        try:
            # Before the first planning: it would give tenants what they may not have.
            self._knowledge.bound_tenants(await self._catalog.quotas())
        except RoostError as error:
            log.warning("quotas_unknown", error=str(error))
        await self._activate(stored, "an earlier placer's")

    async def complete(self, reports: list[Report]) -> list[Report]:
        """The reports to go by: new workers are adopted, and after a loss of the store's content
        those that have not reported again yet are kept. Raises `StoreUnavailable`."""
        known = self._knowledge.reports
        present = {report.worker for report in reports}
        missing = known.keys() - present
        if missing and await self._observer.epoch() != self._epoch:
            await self._store_is_new()
        if self.in_grace:
            reports = [*reports, *(known[worker] for worker in sorted(missing))]
        for report in reports:
            before = known.get(report.worker)
            if before is None:
                await self._adopt(report)
            elif before.incarnation != report.incarnation:
                # Back before anybody missed it. If its end was orderly, its assignment is gone.
                if self._applier.told_to_end(report.worker):
                    self._knowledge.stay(report.worker)  # it did, and this is another one
                self._applier.forget_written(report.worker)
        return reports

    async def check_epoch(self) -> None:
        """Without a missing worker, too, the store may have lost the rest. Raises
        `StoreUnavailable`."""
        if await self._observer.epoch() != self._epoch:
            await self._store_is_new()

    async def find_queues(self) -> None:
        """When the store knew of no active model: queues may hold requests nevertheless (it lost
        its content while no placer was there). Looks for the queue of every registered model;
        the one thing here that costs what is registered, once, beside everything else."""
        try:
            manifests = await self._catalog.ids()
        except RoostError as error:
            log.warning("queues_not_looked_for", error=str(error))
            return
        found = 0
        room = asyncio.Semaphore(_AT_ONCE)

        async def look(model: ModelId) -> None:
            nonlocal found
            async with room:
                if model in self._knowledge.active or not await self._has_queue(model):
                    return
                try:
                    await self._store.add_active(model)
                except StoreUnavailable as error:
                    log.warning("queue_not_kept", model=model, error=str(error))
                    return
                found += 1
                await self._activate({model}, "its queue was found")

        async with asyncio.TaskGroup() as group:
            for manifest in manifests:
                group.create_task(look(manifest.id))
        if found:
            log.info("queues_found", queues=found)

    # --- parts ------------------------------------------------------------------------------

    async def _store_is_new(self) -> None:
        """The store lost its content. This placer has not: it writes everything again."""
        epoch = await self._observer.epoch()
        self._grace_until = self._knowledge.clock() + self._grace_s
        log.warning("store_is_new", epoch=epoch)
        self._knowledge.note("the store lost its content", why="nothing moves for a while")
        for model in [*self._knowledge.active, *self._knowledge.retiring]:
            await self._store.add_active(model)
        self._applier.forget_written()
        # Last: what a store that is away again interrupts is begun anew.
        self._epoch = epoch

    async def _adopt(self, report: Report) -> None:
        """A worker that is new to this placer keeps what it is assigned, unless its models
        have gone elsewhere meanwhile, and what it has bound."""
        knowledge, worker = self._knowledge, report.worker
        stored = await self._store.assignment(worker)
        bound = {model.model for model in report.models if model.bound}
        models = {} if stored is None else {each.model: each.reason for each in stored.models}
        keep = {
            model: reason
            for model, reason in models.items()
            if model in bound or (model in knowledge.active and not knowledge.copies(model))
        }
        for model in bound - models.keys() if stored is None else ():
            keep[model] = "found bound"
        unknown = keep.keys() - knowledge.active.keys() - knowledge.retiring.keys()
        for model in unknown:
            await self._store.add_active(model)
        await self._activate(unknown, "found bound")
        # After a loss of the store the worker may follow a higher generation than what stands
        # there: a lower one would not be told from what it follows.
        generation = max(report.generation, 0 if stored is None else stored.generation)
        knowledge.adopt(worker, keep, generation, leaving=stored is not None and stored.leaving)
        if stored is not None:
            self._applier.adopted(stored)

    async def _activate(self, models: set[ModelId], why: str) -> None:
        """Makes them active. Their queues are not declared: they should be there, workers
        declare what they consume, and a request that finds none has it made."""
        manifests: dict[ModelId, Manifest] = {}
        if len(models) > _ONE_BY_ONE:
            try:
                manifests = {manifest.id: manifest for manifest in await self._catalog.ids()}
            except RoostError as error:
                log.warning("manifests_unknown", error=str(error))
        for model in sorted(models):
            name, version = split_model_id(model)
            try:
                if model in manifests:
                    manifest: Manifest | None = manifests[model]
                else:
                    manifest = await self._catalog.get(name, version)
                newest = (await self._catalog.get(name)).version
            except ModelNotFound as error:
                self._knowledge.activate(model, None, why=why)
                self._knowledge.retire(Retire(model, error.message, code=error.code))
                continue
            except RoostError as error:
                # The registry is away: the model still has its queue and its workers.
                log.warning("manifest_unknown", model=model, error=str(error))
                manifest, newest = None, version
            self._knowledge.defaults[name] = newest
            self._knowledge.activate(model, manifest, why=why).declared = True

    async def _has_queue(self, model: ModelId) -> bool:
        try:
            return await self._broker.depth(model_queue(model)) is not None
        except RoostError as error:
            log.warning("queue_not_looked_for", model=model, error=str(error))
            return False
