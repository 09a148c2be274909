"""Subscriptions as the core wants them: each started however long that takes, stopped at once.

A delivery is read on the event loop (microseconds) and told to the core; nothing is awaited. The
members of a pack are told one by one (members.py)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

from services.worker.core.events import (
    ConsumerGone,
    ConsumerStarted,
    ConsumerStopped,
    Fact,
    StartConsumer,
)
from services.worker.core.window import Window
from services.worker.items import Items
from services.worker.members import Pack
from services.worker.metrics import Metrics
from shared import packs
from shared.broker.port import Broker, Consumer, Delivery, Message
from shared.errors import RoostError
from shared.models import ModelSpec
from shared.names import ModelId, model_queue
from shared.supervise import Backoff

log = structlog.get_logger(__name__)


class _Subscription:
    """One order of the core's, and the task that carries it out."""

    def __init__(self, order: StartConsumer, mean: float | None) -> None:
        self.order = order
        self.window = Window(order.prefetch, mean)
        self.resizing = False
        self.starting: asyncio.Task[None] | None = None
        self.consumer: Consumer | None = None


class Consumers:
    def __init__(
        self,
        broker: Broker,
        items: Items,
        spec_of: Callable[[ModelId], ModelSpec],
        tell: Callable[[Fact], None],
        metrics: Metrics,
    ) -> None:
        self._broker = broker
        self._items = items
        self._spec_of = spec_of
        self._tell = tell
        self._metrics = metrics
        self._subscriptions: dict[int, _Subscription] = {}
        self._windows: dict[ModelId, Window] = {}
        """The newest of each model that was ever consumed."""
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, order: StartConsumer) -> None:
        before = self._windows.get(order.model)
        subscription = _Subscription(order, before.mean if before is not None else None)
        self._windows[order.model] = subscription.window
        self._subscriptions[order.subscription] = subscription
        subscription.starting = self._task(self._start(subscription), f"consume {order.model}")

    def stop(self, id_: int) -> None:
        self._task(self._stop(id_), f"stop {id_}")

    def close(self, id_: int) -> None:
        subscription = self._subscriptions.pop(id_, None)
        if subscription is not None and subscription.consumer is not None:
            self._task(subscription.consumer.close(), f"close {id_}")

    def window(self, model: ModelId) -> Window | None:
        """None for what was never consumed."""
        return self._windows.get(model)

    def forget(self, model: ModelId) -> None:
        self._windows.pop(model, None)

    async def close_all(self) -> None:
        """Gives everything back that is still held."""
        for id_, subscription in list(self._subscriptions.items()):
            if subscription.starting is not None:
                subscription.starting.cancel()
            self.close(id_)
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _start(self, subscription: _Subscription) -> None:
        order = subscription.order
        queue = model_queue(order.model)
        backoff = Backoff(0.05, 2.0)
        while True:
            try:
                # Idempotent; the placer has noted the queue before it assigned the model.
                await self._broker.declare_queue(queue)
                subscription.consumer = await self._broker.consume(
                    queue,
                    lambda delivery: self._on_delivery(subscription, delivery),
                    prefetch=subscription.window.messages,
                    on_gone=lambda: self._tell(ConsumerGone(order.subscription)),
                )
                break
            except RoostError as error:
                log.warning("cannot_consume", queue=queue, error=str(error))
            await asyncio.sleep(backoff.next())
        self._adapt(subscription)
        self._tell(ConsumerStarted(order.subscription))

    async def _stop(self, id_: int) -> None:
        subscription = self._subscriptions.get(id_)
        if subscription is None:
            return
        starting = subscription.starting
        if starting is not None and not starting.done():
            # Asked, the broker may already deliver: end what was begun before it is undone.
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
        if subscription.consumer is not None:
            try:
                await subscription.consumer.cancel()
            except RoostError as error:
                log.warning("cannot_cancel", queue=subscription.consumer.queue, error=str(error))
        self._tell(ConsumerStopped(id_))

    def _on_delivery(self, subscription: _Subscription, delivery: Delivery) -> None:
        window = subscription.window
        singles = self._singles(delivery, window)
        window.came(len(singles))
        self._metrics.taken(len(singles))
        order = subscription.order
        spec, now, wall = self._spec_of(order.model), time.monotonic(), time.time()
        for single in singles:
            self._tell(
                self._items.take(single, order.model, order.subscription, spec, now=now, wall=wall)
            )
        self._adapt(subscription)

    def _adapt(self, subscription: _Subscription) -> None:
        """Has the broker's window follow. What it delivers before it has said that the
        subscription is there counts once that is known."""
        if subscription.consumer is None or subscription.resizing:
            return
        messages = subscription.window.change()
        if messages is not None:
            subscription.resizing = True
            self._task(
                self._resize(subscription, subscription.consumer, messages),
                f"resize {subscription.order.model}",
            )

    def _singles(self, delivery: Delivery, window: Window) -> Sequence[Delivery]:
        """The delivery, or the members of the pack that it is. What calls itself a pack and is
        none is one malformed message."""
        if delivery.malformed is not None or not packs.is_pack(delivery.message):
            return (delivery,)
        try:
            pack = Pack(delivery, self._publish, window.settled)
        except packs.BadPack as error:
            delivery.malformed = f"no pack: {error}"
            return (delivery,)
        window.opened(len(pack.members))
        return pack.members

    async def _publish(self, exchange: str, routing_key: str, message: Message) -> None:
        await self._broker.publish(exchange, routing_key, message)

    async def _resize(self, subscription: _Subscription, consumer: Consumer, messages: int) -> None:
        try:
            await consumer.resize(messages)
        except RoostError as error:
            log.warning("cannot_resize", queue=consumer.queue, error=str(error))
        finally:
            subscription.resizing = False

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("consumer_task_failed", task=task.get_name(), error=repr(error))
