"""One term of the lease: the parts that decide, made anew at its begin and gone at its end, so
that nothing that was known before another placer decided is believed after."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import structlog

from services.placer.activate import Activator
from services.placer.aliases import AliasKeeper
from services.placer.apply import Applier
from services.placer.config import PlacerConfig
from services.placer.core.wanted import LetGo, cheapest_to_let_go
from services.placer.cycle import Cycle
from services.placer.knowledge import Knowledge
from services.placer.lease import Lease
from services.placer.metrics import Metrics
from services.placer.observe import Observer
from services.placer.record import Recorder
from services.placer.recover import Recovery
from services.placer.registry import RegistryFollower
from services.placer.scale import Scale
from services.placer.sizes import Sizes
from shared.broker.port import Broker, BrokerUnavailable, Consumer, Delivery, QueueMissing
from shared.catalog import Catalog
from shared.errors import ModelNotFound, Unavailable
from shared.names import UNROUTED
from shared.repository import Repository
from shared.store.port import Store, StoreUnavailable
from shared.supervise import Backoff, guard
from shared.tracing import Tracing

log = structlog.get_logger(__name__)

_FINISH_S: Final = 1.0
"""For requests that are being placed as the term ends."""


class Term:
    """Runs until cancelled."""

    def __init__(
        self,
        config: PlacerConfig,
        broker: Broker,
        store: Store,
        lease: Lease,
        repository: Repository,
        catalog: Catalog,
        scale: Scale,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self.knowledge = Knowledge(config.policy())
        self._config = config
        self._lease = lease
        self._broker = broker
        self._observer = Observer(
            broker,
            store,
            metrics,
            concurrency=config.depth_concurrency,
            limit=config.depth_questions,
        )
        self._applier = Applier(broker, store, lease, self.knowledge, metrics)
        self._recovery = Recovery(
            broker,
            store,
            catalog,
            self.knowledge,
            self._observer,
            self._applier,
            grace_s=2 * config.heartbeat_s,
        )
        self._recorder = None
        if config.record:
            path, limit = Path(config.record), config.record_max_bytes
            self._recorder = Recorder(path, limit, repository.profiles.get)
        self._sizes = Sizes(repository, self.knowledge)
        self._cycle = Cycle(
            store,
            lease,
            self.knowledge,
            self._observer,
            self._applier,
            self._recovery,
            self._sizes,
            scale,
            metrics,
            config.tick_s,
            self._recorder,
        )
        self._activator = Activator(
            broker, catalog, self._sizes, self.knowledge, self._applier, metrics, tracing
        )
        self._aliases = AliasKeeper(
            store, repository, catalog, self.knowledge, self._activator, self._recovery, lease
        )
        self._registry = RegistryFollower(
            store,
            catalog,
            self.knowledge,
            self._activator,
            self._sizes,
            self._aliases,
            config.registry_check_s,
        )
        self._registry.series = metrics.failures
        self._registry.quarantined = metrics.quarantined.set
        self._handling: set[asyncio.Task[None]] = set()
        self._consumer: Consumer | None = None

    async def run(self) -> None:
        """For ever: recovers what there is, then decides."""
        try:
            await self._begin()
            async with asyncio.TaskGroup() as group:
                for task, name in (
                    (self._cycle.run, "cycle"),
                    (self._cycle.listen, "worker hints"),
                    (self._registry.run, "registry"),
                    (self._registry.listen, "registry hints"),
                    (self._aliases.run, "aliases"),
                    (self._take_unrouted, "unrouted"),
                    (self._find_queues, "find queues"),
                ):
                    group.create_task(guard(task, name), name=name)
        finally:
            await self._end()

    # --- who leaves -------------------------------------------------------------------------

    async def drain(self, worker: str) -> None:
        """Lets the worker go once others have what it has. Idempotent. Returns when the store
        knows, so that the next placer would; raises `Unavailable` otherwise, `ModelNotFound`
        when no such worker reports."""
        self._known(worker)
        self.knowledge.leave(worker, "somebody asked for it")
        await self._keep(worker)

    async def undrain(self, worker: str) -> None:
        """Takes that back, unless the worker was told to end already. Raises as `drain`."""
        self._known(worker)
        if worker in self.ending():
            raise Unavailable(f"worker {worker} has been told to end; start another one")
        self.knowledge.stay(worker)
        await self._keep(worker)

    def ending(self) -> set[str]:
        """Workers that have nothing any more, and were told to end."""
        return {name for name in self.knowledge.leaving if self._applier.told_to_end(name)}

    async def shrink(self, to: int | None) -> LetGo | None:
        """Lets go of the worker that is missed least, unless `to` (by default the fewest there
        may be) or fewer would stay already. Returns it. Raises `Unavailable`."""
        if self._recovery.in_grace:
            raise Unavailable("not all workers have had the time to report yet")
        knowledge = self.knowledge
        staying = knowledge.reports.keys() - knowledge.leaving
        if len(staying) <= (knowledge.policy.min_workers if to is None else to):
            return None
        chosen = cheapest_to_let_go(knowledge.view())
        if chosen is not None:
            knowledge.leave(chosen.worker, chosen.why)
            await self._keep(chosen.worker)
        return chosen

    # --- parts ------------------------------------------------------------------------------

    def _known(self, worker: str) -> None:
        if worker not in self.knowledge.reports:
            raise ModelNotFound(f"no worker {worker!r} reports")

    async def _keep(self, worker: str) -> None:
        try:
            await self._applier.write_one(worker)
        except TimeoutError as error:
            raise Unavailable("the broker does not answer; it is tried again") from error
        self._cycle.wake()

    async def _begin(self) -> None:
        backoff = Backoff(0.1, 2.0)
        while True:
            try:
                await self._recovery.begin()
                # What is known before the first request is handled: the workers.
                await self._cycle.tick()
            except StoreUnavailable as error:
                log.warning("store_unavailable", error=str(error))
                await asyncio.sleep(backoff.next())
            else:
                return

    async def _take_unrouted(self) -> None:
        """Consumes what no queue took. The subscription outlives connections."""
        backoff = Backoff(0.1, 2.0)
        while self._consumer is None:
            try:
                self._consumer = await self._broker.consume(
                    UNROUTED, self._arrived, prefetch=self._config.unrouted_prefetch
                )
            except (BrokerUnavailable, QueueMissing) as error:
                log.warning("unrouted_not_consumed", error=str(error))
                await asyncio.sleep(backoff.next())
        await asyncio.Event().wait()

    async def _find_queues(self) -> None:
        if self._recovery.store_was_empty:
            await self._recovery.find_queues()
        await asyncio.Event().wait()

    def _arrived(self, delivery: Delivery) -> None:
        task = asyncio.create_task(self._activator.handle(delivery))
        self._handling.add(task)
        task.add_done_callback(self._handling.discard)

    async def _end(self) -> None:
        """Takes nothing more, and gives back what is in hand: the next placer gets it."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.cancel()
        if self._handling and self._lease.valid:
            # Most of it needs a moment. What waits for a store or a broker is for the next one.
            await asyncio.wait(set(self._handling), timeout=_FINISH_S)
        tasks = list(self._handling)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._activator.close()
        await self._sizes.close()
        if self._recorder is not None:
            await self._recorder.close()
        if consumer is not None:
            await consumer.close()
