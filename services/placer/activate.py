"""The reflex: what no queue takes falls through to here, and activates its model at once.

A first request costs no tick: the model's queue is declared, a worker chosen and told, and the
request put into the queue, where it waits for the worker. However many arrive at once, each
model is activated once. What cannot be served is answered with the reason.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable

import structlog

from services.placer.apply import Applier
from services.placer.core.plan import Plan, place_one
from services.placer.knowledge import Active, Knowledge
from services.placer.metrics import Metrics
from services.placer.replies import answer, check_deadline, forwarded
from services.placer.sizes import Sizes
from services.placer.spans import failed, placing
from shared import packs
from shared.broker.port import (
    Broker,
    BrokerUnavailable,
    Delivery,
    Message,
    PublishUncertain,
    Unroutable,
)
from shared.catalog import Catalog
from shared.errors import Internal, InvalidRequest, ModelNotFound, RoostError, from_code
from shared.models import Manifest
from shared.names import ModelId, check_name, model_queue
from shared.nvmetrics import reason_of
from shared.store.port import StoreUnavailable
from shared.tracing import Tracing

log = structlog.get_logger(__name__)

_RETRY_S = 0.3
_LATE_S = 1.0
"""Requests that still fall through this long after their route was bound: it is not there."""
_PASS_ON_S = 5.0
"""For what is being published as the term ends: as long as a publish may take."""


class Activator:
    """Handles the deliveries of `names.UNROUTED`."""

    def __init__(
        self,
        broker: Broker,
        catalog: Catalog,
        sizes: Sizes,
        knowledge: Knowledge,
        applier: Applier,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._broker = broker
        self._catalog = catalog
        self._sizes = sizes
        self._knowledge = knowledge
        self._applier = applier
        self._metrics = metrics
        self._tracing = tracing
        self._activating: dict[ModelId, asyncio.Task[None]] = {}
        self._passing: set[asyncio.Task[None]] = set()

    async def handle(self, delivery: Delivery) -> None:
        """One unrouted message: forwarded, answered with an error, dead-lettered, or (when
        broker or store are away for longer than it can wait) given back. Never raises."""
        try:
            if delivery.malformed:
                self._metrics.malformed.inc()
                await delivery.dead_letter(delivery.malformed)
                return
            await self._serve(delivery)
        except (BrokerUnavailable, PublishUncertain) as error:
            # Not answered; a second copy is better than none. The pause keeps what cannot be
            # passed on now from going in circles.
            log.info("request_given_back", routing_key=delivery.routing_key[:200], why=str(error))
            await asyncio.sleep(_RETRY_S)
            await self._quietly(delivery.requeue())
        except RoostError as error:
            # Not even an answer was possible: the message is evidence, and is kept.
            await self._quietly(delivery.dead_letter(f"{error.code}: {error.message}"))
        except Exception:
            log.exception("activation_failed", routing_key=delivery.routing_key[:200])
            await self._quietly(answer(self._broker, delivery, _FAULT, self._metrics))

    async def activate(self, manifest: Manifest, why: str = "first request") -> None:
        """Makes the model active, with a queue, and a worker if there is room: otherwise the
        plan finds one later. One activation of a model at a time; others wait for it. Raises
        why it can never be served by the workers that are there; `Quarantined`,
        `StoreUnavailable`, `BrokerUnavailable`."""
        model = manifest.id
        await self._catalog.check_runnable(model)
        active = self._knowledge.active.get(model)
        if active is not None and active.declared and self._knowledge.copies(model):
            return
        task = self._activating.get(model)
        if task is None:
            task = asyncio.create_task(self._activate(manifest, why), name=f"activate {model}")
            self._activating[model] = task
            task.add_done_callback(lambda done: self._activated(model, done))
        # A caller that is cancelled must not cancel what others wait for.
        await asyncio.shield(task)

    async def close(self) -> None:
        """Ends what is under way; what it was for comes again. What is being published is seen
        through."""
        if self._passing:
            await asyncio.wait(set(self._passing), timeout=_PASS_ON_S)
        tasks = [*self._activating.values(), *self._passing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- parts ------------------------------------------------------------------------------

    async def _serve(self, delivery: Delivery) -> None:
        if self._tracing is None or packs.count(delivery.message) > 1:  # several traces in one
            await self._place_and_pass_on(delivery, delivery.message)
            return
        with placing(self._tracing, delivery) as message:
            await self._place_and_pass_on(delivery, message)

    async def _place_and_pass_on(self, delivery: Delivery, message: Message) -> None:
        """`message` is what goes on to the model's queue."""
        began, manifest = time.perf_counter(), None
        while True:
            try:
                check_deadline(delivery.message)
                manifest = await self._manifest(delivery.routing_key)
                new = not self._knowledge.copies(manifest.id)
                await self.activate(manifest)
                if new:
                    self._metrics.reflex_seconds.labels("first").observe(
                        time.perf_counter() - began
                    )
                await self._pass_on(manifest.id, message, delivery)
            except StoreUnavailable:
                # No assignment can be told to anybody: the request waits here, while it can.
                await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.5))  # noqa: S311
                continue
            except (BrokerUnavailable, PublishUncertain):
                raise
            except RoostError as error:
                if isinstance(error, ModelNotFound | InvalidRequest):
                    self._metrics.unknown.inc()
                if manifest is not None:
                    for _ in range(packs.count(delivery.message)):
                        self._metrics.failures.failed(manifest.id, reason_of(error.code))
                failed(error)
                await answer(self._broker, delivery, error, self._metrics)
                return
            self._metrics.forwarded.inc(packs.count(delivery.message))
            return

    async def _pass_on(self, model: ModelId, message: Message, delivery: Delivery) -> None:
        """Publishes to the model's queue and acknowledges, as one: whoever is cancelled in between
        would have the request answered twice."""

        async def both() -> None:
            await self._forward(model, message, delivery.routing_key)
            await delivery.ack()

        task = asyncio.create_task(both(), name=f"pass on to {model}")
        self._passing.add(task)
        task.add_done_callback(self._passed_on)
        await asyncio.shield(task)

    def _passed_on(self, done: asyncio.Task[None]) -> None:
        self._passing.discard(done)
        if not done.cancelled():
            done.exception()  # seen, even when whoever waited for it has left

    async def _manifest(self, routing_key: str) -> Manifest:
        """The model that a routing key names. Raises `InvalidRequest`, `ModelNotFound`."""
        name, slash, version = routing_key.partition("/")
        if slash:
            manifest = await self._catalog.named(check_name(name), version)
        else:
            manifest = await self._catalog.get(check_name(routing_key))
            if manifest.id in self._knowledge.active:
                self._knowledge.defaults[manifest.name] = manifest.version
        return manifest

    def _activated(self, model: ModelId, done: asyncio.Task[None]) -> None:
        del self._activating[model]
        if not done.cancelled():
            done.exception()  # seen, even when everybody who waited for it has left

    async def _activate(self, manifest: Manifest, why: str) -> None:
        model = manifest.id
        async with self._applier.lock(model):
            known = self._knowledge.active.get(model)
            declared = known is not None and known.declared
            if known is None or not declared:
                known = await self._make_active(manifest, why)
            plan = self._place(manifest, known)
            touched = self._knowledge.commit(plan)
            self._metrics.evictions.inc(len(plan.unbind))
            # The worker is told while the queue is made: a durable one waits for the broker's
            # disk. The worker makes it itself if it comes first, and nothing is routed to it
            # before it is consumed (ADR 0003).
            async with asyncio.TaskGroup() as group:
                for worker in touched:
                    group.create_task(self._tell(worker))
                error = None if declared else await self._declare(model, known)
        if error is not None:
            raise error

    async def _make_active(self, manifest: Manifest, why: str) -> Active:
        """Raises when it can never be served, before anything is made for it."""
        model = manifest.id
        newcomer = Active(manifest)
        newest, _ = await asyncio.gather(
            self._catalog.get(manifest.name),
            self._sizes.learn(newcomer, self._knowledge.device_kinds()),
        )
        self._place(manifest, newcomer, dry=True)
        await self._applier.keep_active(model)
        if model not in self._knowledge.active:
            self._metrics.activations.inc()
        known = self._knowledge.activate(model, manifest, why=why)
        known.known = {**newcomer.known, **known.known}
        known.estimate, known.looked_into = newcomer.estimate, newcomer.looked_into
        known.profiled |= newcomer.profiled
        self._knowledge.defaults[manifest.name] = newest.version
        return known

    async def _declare(self, model: ModelId, known: Active) -> RoostError | None:
        """Makes the model's queue; returns why not, for who waits for it to be told."""
        try:
            await self._applier.declare(model)
        except RoostError as error:
            return error
        known.declared = True
        return None

    async def _tell(self, worker: str) -> None:
        try:
            await self._applier.write_one(worker)
        except (RoostError, TimeoutError) as error:
            # It is wanted now, and the next cycle writes it.
            log.warning("not_applied", what="reflex", of=worker, error=str(error) or "timeout")

    def _place(self, manifest: Manifest, active: Active, *, dry: bool = False) -> Plan:
        """Raises when no worker that is there can ever serve the model."""
        plan = place_one(
            self._knowledge.view((manifest.id, active)), manifest.id, self._knowledge.policy
        )
        for refused in plan.refused:
            if not dry or refused.permanent:
                self._metrics.refusals.labels(refused.kind).inc()
                self._knowledge.note("refused", manifest.id, why=str(refused.refusal))
            if refused.permanent:
                raise from_code(refused.code, f"{manifest.id} cannot be placed: {refused.refusal}")
        return plan

    async def _forward(self, model: ModelId, message: Message, routing_key: str) -> None:
        queue = model_queue(model)
        # Before it is there: a depth that is read meanwhile must not count as "nothing waits".
        self._knowledge.wait(model)
        active = self._knowledge.active.get(model)
        if active is not None and active.bound_keys and routing_key in active.bound_keys:
            lost = self._knowledge.clock() - active.routed_at > _LATE_S
            if lost and model in self._knowledge.consumers:
                active.bound_keys = None  # the broker may have lost its routes: bind them again
        try:
            await self._broker.publish("", queue, forwarded(message))
        except Unroutable:
            async with self._applier.lock(model):
                await self._applier.open_queue(model)
            await self._broker.publish("", queue, forwarded(message))
        self._knowledge.wait(model)

    async def _quietly(self, last: Awaitable[None]) -> None:
        """The last thing to be tried with a message: if it fails, the message comes again."""
        try:
            await last
        except RoostError as error:
            log.info("message_kept_by_broker", error=str(error))


_FAULT = Internal("the placer failed on this request; its log says why")
