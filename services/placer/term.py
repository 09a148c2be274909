"""One term of the lease: the parts that decide, made anew at its begin and gone at its end, so
that nothing that was known before another placer decided is believed after."""

from __future__ import annotations

import asyncio

import structlog

from services.placer.activate import Activator
from services.placer.apply import Applier
from services.placer.config import PlacerConfig
from services.placer.cycle import Cycle
from services.placer.knowledge import Knowledge
from services.placer.lease import Lease
from services.placer.metrics import Metrics
from services.placer.observe import Observer
from services.placer.recover import Recovery
from services.placer.registry import RegistryFollower
from services.placer.scale import Scale
from shared.broker.port import Broker, BrokerUnavailable, Consumer, Delivery, QueueMissing
from shared.catalog import Catalog
from shared.names import UNROUTED
from shared.repository import Repository
from shared.store.port import Store, StoreUnavailable
from shared.supervise import Backoff, guard

log = structlog.get_logger(__name__)


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
    ) -> None:
        self.knowledge = Knowledge(config.policy())
        self._config = config
        self._broker = broker
        self._observer = Observer(broker, store, config.depth_concurrency)
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
        self._cycle = Cycle(
            store,
            lease,
            self.knowledge,
            self._observer,
            self._applier,
            self._recovery,
            scale,
            metrics,
            config.tick_s,
        )
        self._activator = Activator(
            broker, catalog, repository, self.knowledge, self._applier, metrics
        )
        self._registry = RegistryFollower(
            store, catalog, self.knowledge, self._activator, config.registry_check_s
        )
        self._handling: set[asyncio.Task[None]] = set()
        self._consumer: Consumer | None = None

    async def run(self) -> None:
        """For ever: recovers what there is, then decides."""
        await self._begin()
        try:
            async with asyncio.TaskGroup() as group:
                for task, name in (
                    (self._cycle.run, "cycle"),
                    (self._cycle.listen, "worker hints"),
                    (self._registry.run, "registry"),
                    (self._registry.listen, "registry hints"),
                    (self._take_unrouted, "unrouted"),
                    (self._find_queues, "find queues"),
                ):
                    group.create_task(guard(task, name), name=name)
        finally:
            await self._end()

    # --- parts ------------------------------------------------------------------------------

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
        tasks = list(self._handling)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._activator.close()
        if consumer is not None:
            await consumer.close()
