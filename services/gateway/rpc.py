"""Requests out, replies in: publishes to the model's routing key and matches what comes back.

One durable queue per gateway takes all replies. It outlives connections and even, for some
minutes, the gateway; the broker deletes it when nobody uses it. Should the broker lose it, it
is declared again, and what was in it ends as expired requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

import msgspec
import structlog

from services.gateway.core.pending import Pending, Stray
from services.gateway.metrics import Metrics
from shared.broker.port import (
    Broker,
    BrokerUnavailable,
    Consumer,
    Delivery,
    HeaderValue,
    Message,
    PublishUncertain,
    QueueFull,
    QueueMissing,
    Unroutable,
)
from shared.errors import DeadlineExceeded, Overloaded, Unavailable
from shared.names import HEADER_DEADLINE, HEADER_LENGTH, INFER_EXCHANGE, REPLY_QUEUE_PREFIX
from shared.supervise import Backoff

log = structlog.get_logger(__name__)


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One request as it goes to the broker."""

    correlation_id: str
    """Of `Rpc.new_id`."""
    routing_key: str
    body: bytes
    header_length: int | None
    """Bytes of JSON before the raw tensors; None: all of the body is JSON."""
    deadline: float
    """On the event loop's clock, seconds."""
    priority: int = 0
    """AMQP's. Carried along only: neither the model queues nor the workers order by it."""
    headers: dict[str, HeaderValue] = {}
    """Further headers to pass on."""


class Rpc:
    """Calls and their replies over one broker connection."""

    def __init__(
        self,
        broker: Broker,
        instance: str,
        nonce: str,
        metrics: Metrics,
        *,
        publish_timeout_s: float,
        reply_expires_s: float,
        reply_prefetch: int,
    ) -> None:
        """`nonce` tells this start of the gateway from earlier ones under the same instance:
        a reply to one of those must not match."""
        self.reply_queue = f"{REPLY_QUEUE_PREFIX}{instance}"
        self.pending: Pending[asyncio.Future[Message]] = Pending()
        self._broker = broker
        self._nonce = nonce
        self._metrics = metrics
        self._publish_timeout_s = publish_timeout_s
        self._reply_expires_s = reply_expires_s
        self._reply_prefetch = reply_prefetch
        self._serial = 0
        self._consumer: Consumer | None = None
        self._gone = asyncio.Event()
        self._to_ack: deque[Delivery] = deque()
        self._acks_due = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether a request can be sent and its answer received."""
        return self._broker.connected and self._consumer is not None and self._consumer.active

    def new_id(self) -> str:
        """A correlation id that no other call has, of whatever gateway."""
        self._serial += 1
        return f"{self._nonce}{self._serial:x}"

    async def call(self, call: Call) -> Message:
        """Publishes and awaits the reply, whatever it says.

        Raises `Unavailable` (no broker, or nothing takes requests), `Overloaded` (the queue is
        full), `DeadlineExceeded`. Cancelled (the client is gone): only this call ends.
        """
        loop = asyncio.get_running_loop()
        remaining_s = call.deadline - loop.time()
        if remaining_s <= 0:
            raise DeadlineExceeded("the deadline had passed before the request was sent")
        if not self.ready:
            raise Unavailable("the message broker is not connected", retry_after_s=1)
        correlation_id = call.correlation_id
        reply: asyncio.Future[Message] = loop.create_future()
        self.pending.add(correlation_id, reply)
        timer = loop.call_at(call.deadline, self._expire, correlation_id)
        try:
            await self._publish(call, remaining_s)
            return await reply
        finally:
            timer.cancel()
            self.pending.cancel(correlation_id)  # nothing, once it was answered or has expired
            if reply.done() and not reply.cancelled():
                reply.exception()  # expired while publishing: that error says enough

    async def _publish(self, call: Call, remaining_s: float) -> None:
        headers: dict[str, HeaderValue] = dict(call.headers)
        headers[HEADER_DEADLINE] = int((time.time() + remaining_s) * 1000)
        if call.header_length is not None:
            headers[HEADER_LENGTH] = call.header_length
        message = Message(
            body=call.body,
            headers=headers,
            reply_to=self.reply_queue,
            correlation_id=call.correlation_id,
            expiration_ms=max(int(remaining_s * 1000), 1),
            priority=call.priority or None,
        )
        timeout_s = min(self._publish_timeout_s, remaining_s)
        try:
            await self._broker.publish(
                INFER_EXCHANGE, call.routing_key, message, timeout_s=timeout_s
            )
        except PublishUncertain:
            # It may have arrived: the answer is awaited as if it had, until the deadline.
            log.warning("publish_uncertain", routing_key=call.routing_key)
        except QueueFull as error:
            raise Overloaded(f"the queue of model {call.routing_key!r} is full") from error
        except BrokerUnavailable as error:
            raise Unavailable("the message broker is not connected", retry_after_s=1) from error
        except Unroutable as error:
            raise Unavailable("no placer takes requests of idle models now") from error

    def _expire(self, correlation_id: str) -> None:
        reply = self.pending.expire(correlation_id)
        if reply is not None and not reply.done():
            reply.set_exception(DeadlineExceeded("no answer before the request's deadline"))

    def _on_reply(self, delivery: Delivery) -> None:
        self._to_ack.append(delivery)
        self._acks_due.set()
        waiter = self.pending.resolve(delivery.message.correlation_id)
        if isinstance(waiter, Stray):
            self._metrics.stray(waiter.value)
        elif not waiter.done():
            waiter.set_result(delivery.message)

    async def keep_reply_queue(self) -> None:
        """Declares and consumes the reply queue, again whenever it is lost. Never returns."""
        backoff = Backoff()
        while True:
            self._gone.clear()
            try:
                await self._broker.declare_queue(self.reply_queue, expires_s=self._reply_expires_s)
                self._consumer = await self._broker.consume(
                    self.reply_queue,
                    self._on_reply,
                    prefetch=self._reply_prefetch,
                    on_gone=self._gone.set,
                )
            except (BrokerUnavailable, QueueMissing) as error:
                log.info("reply_queue_unavailable", queue=self.reply_queue, error=str(error))
                await asyncio.sleep(backoff.next())
                continue
            backoff.reset()
            log.info("reply_queue_ready", queue=self.reply_queue)
            await self._gone.wait()
            self._consumer = None
            log.warning("reply_queue_lost", queue=self.reply_queue)

    async def acknowledge_replies(self) -> None:
        """Acknowledges in the background what was delivered. Never returns."""
        while True:
            await self._acks_due.wait()
            self._acks_due.clear()
            while self._to_ack:
                await self._to_ack.popleft().ack()

    def give_up(self) -> None:
        """Ends every call that still waits with `Unavailable`: the gateway stops."""
        for reply in self.pending.waiting():
            if not reply.done():
                reply.set_exception(Unavailable("the gateway is stopping"))

    async def close(self) -> None:
        """Acknowledges what is left and stops consuming."""
        while self._to_ack:
            await self._to_ack.popleft().ack()
        if self._consumer is not None:
            await self._consumer.close()
            self._consumer = None
