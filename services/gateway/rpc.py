"""Requests out, replies in: publishes to the model's routing key and matches what comes back.

What comes for a model while a publish to it is under way goes out in one message after it
(core/packer.py, docs/adr/0019), and replies may come in packs too.

One durable queue per gateway takes all replies. It outlives connections and even, for some
minutes, the gateway; the broker deletes it when nobody uses it. Should the broker lose it, it
is declared again, and what was in it ends as expired requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
import structlog

from services.gateway.core.packer import Packer
from services.gateway.core.pending import Pending, Stray
from services.gateway.doubtful import still_awaited
from services.gateway.metrics import Metrics
from shared import packs
from shared.broker.port import (
    Broker,
    BrokerUnavailable,
    ConfirmationLost,
    Consumer,
    Delivery,
    HeaderValue,
    Message,
    PublishUncertain,
    QueueFull,
    QueueMissing,
    Unroutable,
)
from shared.errors import DeadlineExceeded, Internal, Overloaded, RoostError, Unavailable
from shared.names import (
    HEADER_DEADLINE,
    HEADER_LENGTH,
    HEADER_PACKS,
    INFER_EXCHANGE,
    REPLY_QUEUE_PREFIX,
)
from shared.supervise import Backoff

log = structlog.get_logger(__name__)

_PATIENCE_S: Final = 0.01
"""What waits for a publish of its lane to end waits no longer: that is some times what a
confirmation usually takes, and no broker's disk should hold up what could be under way."""

_SETTLE_S: Final = 1.0
"""After the connection is back: what did arrive has its answer by then, as a rule."""


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
    """AMQP's. The model's queue does not order by it, workers do; only equals travel together."""
    headers: dict[str, HeaderValue] = {}
    """Further headers to pass on."""
    on_published: Callable[[], None] | None = None
    """Called once the broker has the message."""
    pack: int = 1
    """Requests of its model that may travel in one message."""

    @property
    def lane(self) -> _Lane:
        return self.routing_key, self.priority


_Lane = tuple[str, int]
"""Of the packer: routing key and priority."""


class _Unsent(NamedTuple):
    """What waits for a publish of its lane to end."""

    call: Call
    reply: asyncio.Future[Message]


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
        alone: bool = False,
    ) -> None:
        """`nonce` tells this start of the gateway from earlier ones under the same instance:
        a reply to one of those must not match. `alone`: no other start will have this instance, so
        its queue goes with it."""
        self.reply_queue = f"{REPLY_QUEUE_PREFIX}{instance}"
        self.pending: Pending[asyncio.Future[Message]] = Pending()
        self._broker = broker
        self._nonce = nonce
        self._metrics = metrics
        self._publish_timeout_s = publish_timeout_s
        self._reply_expires_s = reply_expires_s
        self._reply_prefetch = reply_prefetch
        self._alone = alone
        self._leaving = False
        self._serial = 0
        self._consumer: Consumer | None = None
        self._gone = asyncio.Event()
        self._to_ack: deque[Delivery] = deque()
        self._acks_due = asyncio.Event()
        self._packer: Packer[_Lane, str] = Packer(packs.MAX_BYTES)
        self._unsent: dict[str, _Unsent] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self.patience_s = _PATIENCE_S
        self.settle_s = _SETTLE_S
        self._patience: dict[_Lane, asyncio.TimerHandle] = {}
        """Of the lanes in which something waits, when that goes out in any case."""

    @property
    def ready(self) -> bool:
        """Whether a request can be sent and its answer received."""
        return self._broker.connected and self._consumer is not None and self._consumer.active

    @property
    def inviting(self) -> bool:
        """Whether new clients are welcome: ready, and not about to end."""
        return self.ready and not self._leaving

    def leave(self) -> None:
        """The gateway is about to end: it still answers, but should not be chosen."""
        self._leaving = True

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
            lane = call.lane
            together = self._packer.offer(lane, correlation_id, len(call.body), call.pack)
            if together == [correlation_id]:
                await self._send_alone(call, remaining_s)
            else:
                self._unsent[correlation_id] = _Unsent(call, reply)
                self._begin(lane, together)
                if correlation_id in self._unsent and lane not in self._patience:
                    self._patience[lane] = loop.call_later(self.patience_s, self._hurry, lane)
            return await reply
        finally:
            timer.cancel()
            self.pending.cancel(correlation_id)  # nothing, once it was answered or has expired
            if self._unsent.pop(correlation_id, None) is not None:
                self._packer.withdraw(call.lane, correlation_id)
            if reply.done() and not reply.cancelled():
                reply.exception()  # expired while publishing: that error says enough

    # --- sending ----------------------------------------------------------------------------

    async def _send_alone(self, call: Call, remaining_s: float) -> None:
        try:
            await self._publish((call,), self._message(call, remaining_s), remaining_s)
        finally:
            self._begin(call.lane, self._packer.ended(call.lane))

    def _begin(self, lane: _Lane, together: list[str]) -> None:
        """Sends these in a task of its own: none of the callers may take the others along when
        it goes away."""
        if not together:
            return
        timer = self._patience.pop(lane, None)
        if timer is not None:
            timer.cancel()
        unsent = [self._unsent.pop(each) for each in together]
        task = asyncio.create_task(self._send_together(lane, unsent), name=f"pack for {lane[0]}")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def _hurry(self, lane: _Lane) -> None:
        del self._patience[lane]
        self._begin(lane, self._packer.hurry(lane))

    async def _send_together(self, lane: _Lane, unsent: list[_Unsent]) -> None:
        now = asyncio.get_running_loop().time()
        # Answered means expired, or that nobody waits any more: that goes nowhere.
        waiting = [each for each in unsent if not each.reply.done() and each.call.deadline > now]
        try:
            if waiting:
                left = [each.call.deadline - now for each in waiting]
                messages = [
                    self._message(each.call, s) for each, s in zip(waiting, left, strict=True)
                ]
                calls = [each.call for each in waiting]
                await self._publish(calls, packs.pack(messages), max(left))
        except RoostError as error:
            for each in waiting:
                if not each.reply.done():
                    each.reply.set_exception(_again(error))
        except Exception:
            log.exception("publish_failed", routing_key=lane[0])
            for each in waiting:
                if not each.reply.done():
                    each.reply.set_exception(Internal("the request could not be sent"))
        finally:
            self._begin(lane, self._packer.ended(lane))

    def _message(self, call: Call, remaining_s: float) -> Message:
        headers: dict[str, HeaderValue] = dict(call.headers)
        headers[HEADER_DEADLINE] = int((time.time() + remaining_s) * 1000)
        headers[HEADER_PACKS] = True
        if call.header_length is not None:
            headers[HEADER_LENGTH] = call.header_length
        return Message(
            body=call.body,
            headers=headers,
            reply_to=self.reply_queue,
            correlation_id=call.correlation_id,
            expiration_ms=max(int(remaining_s * 1000), 1),
            priority=call.priority or None,
        )

    async def _publish(self, calls: Sequence[Call], message: Message, remaining_s: float) -> None:
        """The message holds these calls, which have a lane in common."""
        routing_key = calls[0].routing_key
        timeout_s = min(self._publish_timeout_s, remaining_s)
        self._metrics.sent(len(calls))
        try:
            await self._broker.publish(INFER_EXCHANGE, routing_key, message, timeout_s=timeout_s)
        except PublishUncertain as error:
            # It may have arrived: the answer is awaited as if it had, until the deadline.
            log.warning("publish_uncertain", routing_key=routing_key)
            # One that is only not confirmed yet has arrived nearly always: twice would be load.
            if isinstance(error, ConfirmationLost):
                task = asyncio.create_task(self._send_again(calls), name="send again")
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
        except QueueFull as error:
            raise Overloaded(f"the queue of model {routing_key!r} is full") from error
        except BrokerUnavailable as error:
            raise Unavailable("the message broker is not connected", retry_after_s=1) from error
        except Unroutable as error:
            raise Unavailable("no placer takes requests of idle models now") from error
        else:
            for call in calls:
                if call.on_published is not None:
                    call.on_published()

    async def _send_again(self, calls: Sequence[Call]) -> None:
        """Once the connection is back: what has no answer by then may never have arrived. Where it
        did the model runs twice, and the second answer finds nobody."""

        def awaited(call: Call) -> bool:
            return self.pending.awaits(call.correlation_id)

        while calls := await still_awaited(calls, awaited, lambda: self.ready, self.settle_s):
            now = asyncio.get_running_loop().time()
            left = [max(call.deadline - now, 0.001) for call in calls]
            messages = [self._message(call, s) for call, s in zip(calls, left, strict=True)]
            message = packs.pack(messages) if len(messages) > 1 else messages[0]
            key, timeout_s = calls[0].routing_key, min(self._publish_timeout_s, max(left))
            try:
                await self._broker.publish(INFER_EXCHANGE, key, message, timeout_s=timeout_s)
            except (BrokerUnavailable, ConfirmationLost):
                continue
            except RoostError as error:  # the deadline ends it
                log.warning("not_published_again", routing_key=key, error=str(error))
            return

    # --- replies ----------------------------------------------------------------------------

    def _expire(self, correlation_id: str) -> None:
        reply = self.pending.expire(correlation_id)
        if reply is not None and not reply.done():
            reply.set_exception(DeadlineExceeded("no answer before the request's deadline"))

    def _on_reply(self, delivery: Delivery) -> None:
        self._to_ack.append(delivery)
        self._acks_due.set()
        message = delivery.message
        if not packs.is_pack(message):
            self._resolve(message)
            return
        try:
            replies = packs.members(message)
        except packs.BadPack as error:
            log.error("malformed_reply", pack=str(error))
            self._metrics.stray(Stray.UNKNOWN.value)
            return
        for reply in replies:
            self._resolve(reply)

    def _resolve(self, reply: Message) -> None:
        waiter = self.pending.resolve(reply.correlation_id)
        if isinstance(waiter, Stray):
            self._metrics.stray(waiter.value, reply.correlation_id)
        elif not waiter.done():
            waiter.set_result(reply)

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
        for task in self._sending:
            task.cancel()
        for timer in self._patience.values():
            timer.cancel()
        while self._to_ack:
            await self._to_ack.popleft().ack()
        if self._consumer is not None:
            await self._consumer.close()
            self._consumer = None
            if self._alone:
                # What still comes for it is for nobody: better said to who sends it.
                with contextlib.suppress(RoostError):
                    await self._broker.delete_queue(self.reply_queue)


def _again(error: RoostError) -> RoostError:
    """One for each of several: who is told adds to it what concerns only that one."""
    if isinstance(error, Overloaded | Unavailable):
        return type(error)(error.message, retry_after_s=error.retry_after_s)
    return error
