"""The broker port on RabbitMQ (3.10 to 4.3), by aio-pika.

Two connections, each kept up by itself: one publishes, one consumes and declares. A memory or
disk alarm stops what publishes, and must not stop acknowledgements.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog
from aiormq.abc import AbstractChannel
from pamqp.common import FieldValue

from shared import names
from shared.broker.consumer import AmqpConsumer
from shared.broker.messages import check_size
from shared.broker.port import BrokerUnavailable, Message, OnDelivery, QueueMissing
from shared.broker.publisher import Publisher
from shared.broker.session import Link, Precondition, Refused, Session, asked
from shared.tls import SYSTEM, ClientTls

log = structlog.get_logger(__name__)

_QUEUE_ARGUMENTS: Final[dict[str, FieldValue]] = {"x-queue-type": "classic"}
"""Explicit, since a virtual host may have another default. Limits are policies: an argument
can never change again. No quorum queues: placement cancels and consumes all the time."""
_SUBSCRIBING_AT_ONCE: Final = 32
_CLOSE_TIMEOUT_S: Final = 5.0
_PUBLISH_TIMEOUT_S: Final = 5.0


class AmqpBroker:
    """`port.Broker` on one virtual host. `name` is shown in the broker's list of connections."""

    def __init__(self, url: str, name: str, tls: ClientTls = SYSTEM) -> None:
        self._publisher: Publisher | None = None
        self._publishing = Link(url, f"{name} publish", self._prepare_publishing, tls)
        self._consuming = Link(url, f"{name} consume", _declare_topology, tls)
        self._consumers: set[AmqpConsumer] = set()
        self._turn = asyncio.Semaphore(_SUBSCRIBING_AT_ONCE)
        self._warned: set[str] = set()

    @property
    def connected(self) -> bool:
        session = self._publishing.session
        return (
            session is not None and not session.lost.is_set() and self._publishing.blocked is None
        )

    async def start(self) -> None:
        self._publishing.start()
        self._consuming.start()
        await self._publishing.up()
        await self._consuming.up()

    async def close(self) -> None:
        # Publishing ends last: what consumers hold may still be dead-lettered meanwhile.
        for consumer in tuple(self._consumers):
            await consumer.cancel()
        session = self._consuming.session
        if session is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await session.outbox.flushed()
        await self._consuming.close()
        await self._publishing.close()

    # --- messages ---

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        message: Message,
        *,
        mandatory: bool = True,
        timeout_s: float = _PUBLISH_TIMEOUT_S,
    ) -> None:
        check_size(message)
        await self._publish(exchange, routing_key, message, mandatory, timeout_s)

    async def _publish(
        self,
        exchange: str,
        routing_key: str,
        message: Message,
        mandatory: bool = True,
        timeout_s: float = _PUBLISH_TIMEOUT_S,
    ) -> None:
        self._publishing.now()
        if self._publishing.blocked is not None:
            raise BrokerUnavailable(f"the broker takes no messages: {self._publishing.blocked}")
        assert self._publisher is not None
        await self._publisher.publish(
            exchange, routing_key, message, mandatory=mandatory, timeout_s=timeout_s
        )

    async def consume(
        self,
        queue: str,
        on_delivery: OnDelivery,
        *,
        prefetch: int,
        on_gone: Callable[[], None] | None = None,
        priority: int = 0,
    ) -> AmqpConsumer:
        if not 0 < prefetch < 65536:
            raise ValueError("prefetch must be from 1 to 65535: 0 would mean no limit")
        consumer = AmqpConsumer(
            self._consuming,
            queue,
            on_delivery,
            self._publish,
            prefetch=prefetch,
            priority=priority,
            on_gone=on_gone,
            turn=self._turn,
            on_over=self._consumers.discard,
        )
        await consumer.start()
        self._consumers.add(consumer)
        return consumer

    # --- queues ---

    async def declare_queue(self, queue: str, *, expires_s: float | None = None) -> None:
        arguments: dict[str, FieldValue] = dict(_QUEUE_ARGUMENTS)
        if expires_s is not None:
            arguments["x-expires"] = int(expires_s * 1000)
        # Not remembered: another service may delete the queue at any time.
        try:
            async with self._consuming.now().admin() as channel:
                await asked(channel.queue_declare(queue, durable=True, arguments=arguments))
        except Precondition as error:
            # It is there, of another type or expiry (another version's, an operator's). It
            # serves; refusing it would be an outage over a detail.
            if queue not in self._warned:
                self._warned.add(queue)
                log.warning("a queue has other arguments", queue=queue, error=str(error))

    async def bind(self, queue: str, routing_key: str) -> None:
        async with self._consuming.now().admin() as channel:
            await asked(channel.queue_bind(queue, names.INFER_EXCHANGE, routing_key))

    async def unbind(self, queue: str, routing_key: str) -> None:
        with suppress(QueueMissing):
            async with self._consuming.now().admin() as channel:
                await asked(channel.queue_unbind(queue, names.INFER_EXCHANGE, routing_key))

    async def delete_queue(self, queue: str, *, if_unused: bool = True) -> bool:
        try:
            async with self._consuming.now().admin() as channel:
                await asked(channel.queue_delete(queue, if_unused=if_unused, if_empty=True))
        except Precondition:
            return False
        except QueueMissing:
            return True
        return True

    async def depth(self, queue: str) -> int | None:
        try:
            async with self._consuming.now().admin() as channel:
                answer = await asked(channel.queue_declare(queue, passive=True))
        except QueueMissing:
            return None
        return answer.message_count

    async def _prepare_publishing(self, session: Session) -> None:
        # On both connections: neither may be used before the exchanges are there, and nobody
        # says which one comes back first after the broker lost its data.
        await _declare_topology(session)
        publisher = Publisher(session)
        await publisher.open()
        self._publisher = publisher


async def _declare_topology(session: Session) -> None:
    try:
        await _declare_all(session)
    except Precondition:
        raise
    except Refused:
        # A user who may not configure them (docs/amqp.md): it is enough that they are there.
        # Raises `QueueMissing` until somebody has made them.
        async with session.admin() as channel:
            for name in (names.UNROUTED, names.DEAD):
                await asked(channel.queue_declare(name, passive=True))
            for name in (names.UNROUTED, names.DEAD, names.INFER_EXCHANGE):
                await asked(channel.exchange_declare(name, passive=True))


async def _declare_all(session: Session) -> None:
    async with session.admin() as channel:
        await _declare_sink(channel, names.UNROUTED)
        await _declare_sink(channel, names.DEAD)
        await asked(
            channel.exchange_declare(
                names.INFER_EXCHANGE,
                exchange_type="direct",
                durable=True,
                # An argument and not a policy: this is what the exchange is.
                arguments={"alternate-exchange": names.UNROUTED},
            )
        )


async def _declare_sink(channel: AbstractChannel, name: str) -> None:
    """A fanout exchange with one queue behind it."""
    await asked(channel.exchange_declare(name, exchange_type="fanout", durable=True))
    await asked(channel.queue_declare(name, durable=True, arguments=dict(_QUEUE_ARGUMENTS)))
    await asked(channel.queue_bind(name, name))
