"""What the services need of a message broker, and nothing more.

Laws that both implementations keep (tests/contract/test_broker.py):

- A publish that returns was confirmed by the broker and reached at least one queue (unless
  `mandatory=False`). One that raises `PublishUncertain` may or may not have arrived.
- Nothing is lost between two sessions: what a consumer held unacknowledged when its connection
  went is delivered again; acknowledging it afterwards is silently dropped.
- Handlers are synchronous and only enqueue. They run on the event loop, in delivery order.
- A subscription outlives connections: the broker consumes again after each reconnect, every
  queue by itself, so that one queue's trouble is that queue's alone.
- A message whose properties cannot be decoded is delivered with `malformed` set, and costs
  nobody a connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from shared.errors import RoostError, Unavailable

HeaderValue = str | int | float | bool | bytes | None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message and the AMQP properties that Roost uses."""

    body: bytes
    headers: dict[str, HeaderValue] = {}
    reply_to: str | None = None
    correlation_id: str | None = None
    message_id: str | None = None
    """As received. When publishing, the adapter always sends a fresh one."""
    content_type: str | None = None
    expiration_ms: int | None = None
    """The broker drops the message when it is still queued after this long."""
    priority: int | None = None
    persistent: bool = True


class Delivery(Protocol):
    """One received message. Exactly one of the three answers is given to it; after the
    connection that brought it is gone, an answer does nothing."""

    message: Message
    queue: str
    routing_key: str
    redelivered: bool
    malformed: str | None
    """Why the properties could not be decoded; then `message` has only body and, in
    `names.HEADER_RAW_PROPERTIES`, the raw properties. Also set when only the routing key is
    not UTF-8; `routing_key` is then escaped, and `message` whole."""

    async def ack(self) -> None: ...
    async def requeue(self) -> None: ...
    async def dead_letter(self, reason: str) -> None:
        """Moves the message to `names.DEAD` with the reason in its headers, then acknowledges.
        Raises what `Broker.publish` raises; the message is then still held and unanswered."""


class Consumer(Protocol):
    """A subscription to one queue."""

    queue: str

    @property
    def active(self) -> bool:
        """True while the broker has this consumer registered."""

    async def resize(self, prefetch: int) -> None:
        """Another prefetch from now on; on RabbitMQ what is held already does not count against
        it. Without effect once the consumer is over. Raises `BrokerUnavailable`: then it counts
        from the next connection."""

    async def cancel(self) -> None:
        """No further deliveries. What is held stays held and can still be acknowledged."""

    async def close(self) -> None:
        """Cancels, and returns what is still held to the queue. Idempotent."""


OnDelivery = Callable[[Delivery], None]


class Broker(Protocol):
    """One service's connection to the message broker."""

    @property
    def connected(self) -> bool:
        """Whether a publish has a chance now: connected, and not blocked by an alarm."""

    async def start(self) -> None:
        """Connects (waits until the broker answers, with back-off), declares exchanges,
        `UNROUTED` and `DEAD`, and keeps the connection up from then on."""

    async def close(self) -> None: ...

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        message: Message,
        *,
        mandatory: bool = True,
        timeout_s: float = 5.0,
    ) -> None:
        """Publishes and awaits the broker's confirmation. `exchange=""` addresses a queue.

        Raises `Unroutable` (mandatory, and no queue took it), `QueueFull` (the queue's limit
        rejected it), `BrokerUnavailable` (not sent), `PublishUncertain` (sent, unconfirmed).
        """

    async def consume(
        self,
        queue: str,
        on_delivery: OnDelivery,
        *,
        prefetch: int,
        on_gone: Callable[[], None] | None = None,
        priority: int = 0,
    ) -> Consumer:
        """Subscribes. Raises `QueueMissing`, `BrokerUnavailable`. `on_gone` is called once if
        the queue is later deleted; the consumer is then over. `priority`: RabbitMQ's
        x-priority of the consumer."""

    async def declare_queue(self, queue: str, *, expires_s: float | None = None) -> None:
        """Creates the durable classic queue if it is not there. `expires_s`: deleted by the
        broker when unused for so long (for reply queues only: it takes messages along)."""

    async def bind(self, queue: str, routing_key: str) -> None:
        """Routes `routing_key` of `names.INFER_EXCHANGE` to the queue. Idempotent."""

    async def unbind(self, queue: str, routing_key: str) -> None:
        """Idempotent; a missing queue is no error."""

    async def delete_queue(self, queue: str, *, if_unused: bool = True) -> bool:
        """Deletes the queue if it is empty (and has no consumer). False when the broker kept
        it; True when it is gone.

        To RabbitMQ, messages that a cancelled consumer still holds do not count: deleting the
        queue then, they can be acknowledged no more, and not be returned. Delete only once
        nobody holds any."""

    async def depth(self, queue: str) -> int | None:
        """Messages ready in the queue (held ones not counted); None when there is none."""


class BrokerUnavailable(Unavailable):
    """The broker cannot be reached, or its alarm blocks publishers. Nothing was sent."""


class PublishUncertain(Unavailable):
    """The message was sent, but no confirmation came in time: it may arrive, or not."""


class ConfirmationLost(PublishUncertain):
    """Nor will one ever come: the connection was lost meanwhile."""


class Unroutable(RoostError):
    """No queue took a mandatory message."""

    code = "unavailable"


class QueueFull(RoostError):
    """The queue's own limit rejected the message."""

    code = "resource_exhausted"
    retryable = True


class QueueMissing(RoostError):
    """The queue does not exist."""

    code = "unavailable"
