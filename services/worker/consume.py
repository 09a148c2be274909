"""Subscriptions as the core wants them: each started however long that takes, stopped at once.

A delivery is read on the event loop (microseconds) and told to the core; nothing is awaited."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from services.worker.core.events import (
    ConsumerGone,
    ConsumerStarted,
    ConsumerStopped,
    Fact,
    StartConsumer,
)
from services.worker.items import Items
from shared.broker.port import Broker, Consumer, Delivery
from shared.errors import RoostError
from shared.models import ModelSpec
from shared.names import ModelId, model_queue
from shared.supervise import Backoff

log = structlog.get_logger(__name__)


class _Subscription:
    """One order of the core's, and the task that carries it out."""

    def __init__(self, order: StartConsumer) -> None:
        self.order = order
        self.starting: asyncio.Task[None] | None = None
        self.consumer: Consumer | None = None


class Consumers:
    def __init__(
        self,
        broker: Broker,
        items: Items,
        spec_of: Callable[[ModelId], ModelSpec],
        tell: Callable[[Fact], None],
    ) -> None:
        self._broker = broker
        self._items = items
        self._spec_of = spec_of
        self._tell = tell
        self._subscriptions: dict[int, _Subscription] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, order: StartConsumer) -> None:
        subscription = _Subscription(order)
        self._subscriptions[order.subscription] = subscription
        subscription.starting = self._task(self._start(subscription), f"consume {order.model}")

    def stop(self, id_: int) -> None:
        self._task(self._stop(id_), f"stop {id_}")

    def close(self, id_: int) -> None:
        subscription = self._subscriptions.pop(id_, None)
        if subscription is not None and subscription.consumer is not None:
            self._task(subscription.consumer.close(), f"close {id_}")

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
                    lambda delivery: self._on_delivery(order, delivery),
                    prefetch=order.prefetch,
                    on_gone=lambda: self._tell(ConsumerGone(order.subscription)),
                )
                break
            except RoostError as error:
                log.warning("cannot_consume", queue=queue, error=str(error))
            await asyncio.sleep(backoff.next())
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

    def _on_delivery(self, order: StartConsumer, delivery: Delivery) -> None:
        self._tell(
            self._items.take(
                delivery,
                order.model,
                order.subscription,
                self._spec_of(order.model),
                now=time.monotonic(),
                wall=time.time(),
            )
        )

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("consumer_task_failed", task=task.get_name(), error=repr(error))
