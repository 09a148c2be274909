"""The broker port in memory: the same laws without a broker, for tests and the embedded mode.

`MemoryExchange` is the server, shared by the `MemoryBroker`s of one process. What RabbitMQ does
to time, order and fairness it does too; what differs: nothing survives the process, and the
expiry of unused queues is ignored.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
import uuid
from collections import deque
from collections.abc import Callable

import msgspec
import structlog

from shared import names
from shared.broker.messages import check_size, dead_letter, outgoing_headers
from shared.broker.port import (
    BrokerUnavailable,
    Message,
    OnDelivery,
    QueueFull,
    QueueMissing,
    Unroutable,
)

log = structlog.get_logger(__name__)


class _Entry:
    """One message in one queue. Ordered by arrival, so that a returned one keeps its place."""

    __slots__ = ("expires_at", "message", "order", "redelivered", "routing_key")

    def __init__(self, order: int, message: Message, routing_key: str) -> None:
        self.order = order
        self.message = message
        self.routing_key = routing_key
        self.redelivered = False
        ttl = message.expiration_ms
        self.expires_at = None if ttl is None else time.monotonic() + ttl / 1000

    def __lt__(self, other: _Entry) -> bool:
        return self.order < other.order


class _Queue:
    """Ready messages (a heap) and the consumers in the order of their turns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready: list[_Entry] = []
        self.consumers: deque[MemoryConsumer] = deque()
        self.pumping = False

    def drop_expired(self) -> None:
        """Only at the head, as RabbitMQ does."""
        now = time.monotonic()
        while self.ready and (at := self.ready[0].expires_at) is not None and at <= now:
            heapq.heappop(self.ready)

    def next_consumer(self) -> MemoryConsumer | None:
        """The one of highest priority that has room, in turns among equals."""
        best: MemoryConsumer | None = None
        for consumer in self.consumers:
            if consumer.has_room and (best is None or consumer.priority > best.priority):
                best = consumer
        if best is not None:
            self.consumers.remove(best)
            self.consumers.append(best)
        return best


class MemoryExchange:
    """The server: exchanges, queues and bindings."""

    def __init__(self) -> None:
        self.queues: dict[str, _Queue] = {}
        self.bindings: dict[str, set[str]] = {}
        """Queues by routing key of `names.INFER_EXCHANGE`."""
        self.max_length: dict[str, int] = {}
        """Limits by queue, as a policy would set them: beyond it, publishes are rejected."""
        self._order = itertools.count()
        for name in (names.UNROUTED, names.DEAD):
            self.declare(name)

    def declare(self, queue: str) -> None:
        if queue not in self.queues:
            self.queues[queue] = _Queue(queue)

    def delete(self, queue: str) -> None:
        """Deletes it whatever it holds; its consumers are told."""
        gone = self.queues.pop(queue, None)
        for keys in self.bindings.values():
            keys.discard(queue)
        if gone is not None:
            for consumer in tuple(gone.consumers):
                consumer.queue_gone()

    def route(self, exchange: str, routing_key: str) -> list[_Queue]:
        """The queues that take this message."""
        match exchange:
            case "":
                targets = {routing_key}
            case names.INFER_EXCHANGE:
                targets = self.bindings.get(routing_key) or {names.UNROUTED}
            case names.UNROUTED | names.DEAD:
                targets = {exchange}
            case _:
                raise BrokerUnavailable(f"there is no exchange {exchange!r}")
        return [self.queues[name] for name in sorted(targets) if name in self.queues]

    def publish(self, exchange: str, routing_key: str, message: Message, mandatory: bool) -> None:
        queues = self.route(exchange, routing_key)
        if not queues and mandatory:
            raise Unroutable(f"no queue takes {exchange or 'queue'} {routing_key!r}")
        for queue in queues:
            queue.drop_expired()
            limit = self.max_length.get(queue.name)
            if limit is not None and len(queue.ready) >= limit:
                raise QueueFull("the queue is full")
        for queue in queues:
            self.put(queue, _Entry(next(self._order), message, routing_key))

    def put(self, queue: _Queue, entry: _Entry) -> None:
        heapq.heappush(queue.ready, entry)
        self.pump_soon(queue)

    def pump_soon(self, queue: _Queue) -> None:
        """Hands out messages in the loop's next turn, never inside the caller."""
        if not queue.pumping:
            queue.pumping = True
            asyncio.get_running_loop().call_soon(self._pump, queue)

    def _pump(self, queue: _Queue) -> None:
        queue.pumping = False
        while True:
            queue.drop_expired()
            if not queue.ready:
                return
            consumer = queue.next_consumer()
            if consumer is None:
                return
            consumer.deliver(heapq.heappop(queue.ready))


class MemoryDelivery:
    """See `port.Delivery`."""

    malformed: str | None = None

    def __init__(self, consumer: MemoryConsumer, entry: _Entry) -> None:
        self.message = entry.message
        self.queue = consumer.queue
        self.routing_key = entry.routing_key
        self.redelivered = entry.redelivered
        self._consumer = consumer
        self._entry = entry

    async def ack(self) -> None:
        self._consumer.take_back(self, requeue=False)

    async def requeue(self) -> None:
        self._consumer.take_back(self, requeue=True)

    async def dead_letter(self, reason: str) -> None:
        if self in self._consumer.held:
            letter = dead_letter(self.message, self.queue, self.routing_key, reason)
            await self._consumer.broker.publish(names.DEAD, "", letter)
            self._consumer.take_back(self, requeue=False)


class MemoryConsumer:
    """See `port.Consumer`."""

    def __init__(
        self,
        broker: MemoryBroker,
        queue: str,
        on_delivery: OnDelivery,
        prefetch: int,
        priority: int,
        on_gone: Callable[[], None] | None,
    ) -> None:
        self.broker = broker
        self.queue = queue
        self.priority = priority
        self.held: dict[MemoryDelivery, _Entry] = {}
        self.over = False
        self._on_delivery = on_delivery
        self._prefetch = prefetch
        self._on_gone = on_gone
        self._server = broker.server
        self._source: _Queue | None = None
        """The very queue: another of the same name, made later, takes nothing back."""

    @property
    def active(self) -> bool:
        queue = self._server.queues.get(self.queue)
        return queue is not None and self in queue.consumers

    @property
    def has_room(self) -> bool:
        return len(self.held) < self._prefetch

    def subscribe(self) -> None:
        queue = self._server.queues.get(self.queue)
        if queue is None:
            raise QueueMissing(f"there is no queue {self.queue!r}")
        self._source = queue
        queue.consumers.append(self)
        self._server.pump_soon(queue)

    def unsubscribe(self) -> None:
        queue = self._server.queues.get(self.queue)
        if queue is not None and self in queue.consumers:
            queue.consumers.remove(self)

    async def resize(self, prefetch: int) -> None:
        self._prefetch = prefetch
        if self._source is not None:
            self._server.pump_soon(self._source)

    async def cancel(self) -> None:
        self.over = True
        self.unsubscribe()

    async def close(self) -> None:
        await self.cancel()
        self.broker.consumers.discard(self)
        self.give_back()

    def deliver(self, entry: _Entry) -> None:
        delivery = MemoryDelivery(self, entry)
        self.held[delivery] = entry
        try:
            self._on_delivery(delivery)
        except Exception:
            log.exception("a delivery handler failed", queue=self.queue)

    def take_back(self, delivery: MemoryDelivery, *, requeue: bool) -> None:
        """An answer. One that was given before, or too late, does nothing."""
        entry = self.held.pop(delivery, None)
        queue = self._server.queues.get(self.queue)
        if entry is None or queue is None or queue is not self._source:
            return
        if requeue:
            entry.redelivered = True
            self._server.put(queue, entry)
        self._server.pump_soon(queue)

    def give_back(self) -> None:
        """Returns everything that is held."""
        for delivery in tuple(self.held):
            self.take_back(delivery, requeue=True)

    def queue_gone(self) -> None:
        self.over = True
        self.held.clear()
        self.broker.consumers.discard(self)
        if self._on_gone is not None:
            asyncio.get_running_loop().call_soon(self._on_gone)


class MemoryBroker:
    """`port.Broker` on a `MemoryExchange`. Tests cut it off with `lose()`."""

    def __init__(self, server: MemoryExchange, name: str) -> None:
        self.server = server
        self.name = name
        self.consumers: set[MemoryConsumer] = set()
        """All that are not closed; the cancelled among them may still hold messages."""
        self.blocked: str | None = None
        """Set it to let publishes fail as under a broker's alarm."""
        self._up = False

    @property
    def connected(self) -> bool:
        return self._up and self.blocked is None

    async def start(self) -> None:
        self._up = True

    async def close(self) -> None:
        for consumer in tuple(self.consumers):
            await consumer.close()
        self._up = False

    def lose(self) -> None:
        """The connection goes: what is held returns to its queues."""
        self._up = False
        for consumer in self.consumers:
            consumer.unsubscribe()
            consumer.give_back()

    def restore(self) -> None:
        """The connection is there again, and so are the subscriptions."""
        self._up = True
        for consumer in [each for each in self.consumers if not each.over]:
            try:
                consumer.subscribe()
            except QueueMissing:
                consumer.queue_gone()

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        message: Message,
        *,
        mandatory: bool = True,
        timeout_s: float = 5.0,  # noqa: ARG002 - nothing here takes time
    ) -> None:
        check_size(message)
        self._reach()
        if self.blocked is not None:
            raise BrokerUnavailable(f"the broker takes no messages: {self.blocked}")
        sent = msgspec.structs.replace(
            message, headers=outgoing_headers(message), message_id=uuid.uuid4().hex
        )
        self.server.publish(exchange, routing_key, sent, mandatory)
        await asyncio.sleep(0)

    async def consume(
        self,
        queue: str,
        on_delivery: OnDelivery,
        *,
        prefetch: int,
        on_gone: Callable[[], None] | None = None,
        priority: int = 0,
    ) -> MemoryConsumer:
        if not 0 < prefetch < 65536:
            raise ValueError("prefetch must be from 1 to 65535: 0 would mean no limit")
        self._reach()
        consumer = MemoryConsumer(self, queue, on_delivery, prefetch, priority, on_gone)
        consumer.subscribe()
        self.consumers.add(consumer)
        return consumer

    async def declare_queue(
        self,
        queue: str,
        *,
        expires_s: float | None = None,  # noqa: ARG002 - a process's queues end with it
    ) -> None:
        self._reach()
        self.server.declare(queue)

    async def bind(self, queue: str, routing_key: str) -> None:
        self._reach()
        if queue not in self.server.queues:
            raise QueueMissing(f"there is no queue {queue!r}")
        self.server.bindings.setdefault(routing_key, set()).add(queue)

    async def unbind(self, queue: str, routing_key: str) -> None:
        self._reach()
        self.server.bindings.get(routing_key, set()).discard(queue)

    async def delete_queue(self, queue: str, *, if_unused: bool = True) -> bool:
        self._reach()
        found = self.server.queues.get(queue)
        if found is not None:
            found.drop_expired()
            if found.ready or (if_unused and found.consumers):
                return False
            self.server.delete(queue)
        return True

    async def depth(self, queue: str) -> int | None:
        self._reach()
        found = self.server.queues.get(queue)
        if found is None:
            return None
        found.drop_expired()
        return len(found.ready)

    def _reach(self) -> None:
        if not self._up:
            raise BrokerUnavailable("no connection to the broker")
