"""Consumers on RabbitMQ that outlive connections, and the deliveries they hand on."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Final

import structlog
from aiormq.abc import DeliveredMessage
from pamqp import commands as spec
from pamqp.common import FieldValue

from shared import names
from shared.broker import channels, encode
from shared.broker.channels import ConsumeChannel
from shared.broker.frames import MalformedHeader, MangledDeliver
from shared.broker.messages import dead_letter
from shared.broker.port import BrokerUnavailable, HeaderValue, Message, OnDelivery, QueueMissing
from shared.broker.session import Link, Session, asked, backoff_s
from shared.errors import InvalidRequest, RoostError

log = structlog.get_logger(__name__)

MAX_RAW_PROPERTIES: Final = 4096
"""Bytes kept of properties that could not be decoded. They travel as a header, which must
itself stay below what `frames` is willing to decode."""
_ROUTING_HEADERS: Final = frozenset({"CC", "BCC"})
"""Further routing keys: whoever published these headers again would deliver for the producer
wherever that one likes."""

Publish = Callable[[str, str, Message], Awaitable[None]]


class AmqpDelivery:
    """One received message; see `port.Delivery`. It belongs to the channel that brought it:
    once that one is closed, RabbitMQ has the message back, and answers are dropped."""

    __slots__ = (
        "_answered", "_channel", "_outbox", "_publish", "_tag",
        "malformed", "message", "queue", "redelivered", "routing_key",
    )  # fmt: skip

    def __init__(
        self,
        received: DeliveredMessage,
        queue: str,
        channel: ConsumeChannel,
        outbox: channels.Outbox,
        publish: Publish,
    ) -> None:
        frame = received.delivery
        assert isinstance(frame, spec.Basic.Deliver)
        self.message = decode_message(received)
        self.queue = queue
        self.routing_key = frame.routing_key or ""
        self.redelivered = frame.redelivered
        self.malformed: str | None = None
        if isinstance(received.header, MalformedHeader):
            self.malformed = received.header.reason
        elif isinstance(frame, MangledDeliver):
            self.malformed = "the routing key is not UTF-8"
        self._tag = frame.delivery_tag or 0
        self._channel = channel
        self._outbox = outbox
        self._publish = publish
        self._answered = False

    async def ack(self) -> None:
        self._answer(encode.ack_frame(self._channel.number, self._tag))

    async def requeue(self) -> None:
        self._answer(encode.requeue_frame(self._channel.number, self._tag))

    async def dead_letter(self, reason: str) -> None:
        """When the publish fails its error is raised, and the message is still held."""
        if self._answered or self._channel.retired:
            return
        letter = dead_letter(self.message, self.queue, self.routing_key, reason)
        try:
            await self._publish(names.DEAD, "", letter)
        except InvalidRequest:
            # Headers so many that ours do not fit beside them: the body goes alone.
            bare = Message(body=self.message.body)
            letter = dead_letter(bare, self.queue, self.routing_key, reason)
            await self._publish(names.DEAD, "", letter)
        self._answer(encode.ack_frame(self._channel.number, self._tag))

    def _answer(self, frame: bytes) -> None:
        # A second answer would be an unknown tag to the broker, which closes the channel.
        if not self._answered and not self._channel.retired and not self._channel.is_closed:
            self._answered = True
            self._outbox.send(self._channel, frame)


def decode_message(received: DeliveredMessage) -> Message:
    """The properties that Roost uses. Header values that are not plain are left out."""
    header = received.header
    if isinstance(header, MalformedHeader):
        raw = base64.b64encode(header.raw[:MAX_RAW_PROPERTIES]).decode()
        return Message(body=received.body, headers={names.HEADER_RAW_PROPERTIES: raw})
    properties = header.properties
    expiration = properties.expiration or ""
    return Message(
        body=received.body,
        headers=_plain(properties.headers) if properties.headers else {},
        reply_to=properties.reply_to or None,
        correlation_id=properties.correlation_id or None,
        message_id=properties.message_id or None,
        content_type=properties.content_type or None,
        expiration_ms=int(expiration) if expiration.isdecimal() else None,
        priority=properties.priority,
        persistent=properties.delivery_mode == 2,
    )


def _plain(table: Mapping[str, object]) -> dict[str, HeaderValue]:
    plain: dict[str, HeaderValue] = {}
    for key, value in table.items():
        if key in _ROUTING_HEADERS:
            continue
        if value is None or isinstance(value, str | int | float | bytes):
            plain[key] = value
        elif isinstance(value, bytearray):
            plain[key] = bytes(value)
        elif isinstance(value, datetime):
            plain[key] = int(value.timestamp())
    return plain


class AmqpConsumer:
    """A subscription to one queue, on a channel of its own.

    When the channel goes (the connection was lost, the broker cancelled the consumer or closed
    the channel), it subscribes again by itself. A queue that is then missing is gone.
    """

    def __init__(
        self,
        link: Link,
        queue: str,
        on_delivery: OnDelivery,
        publish: Publish,
        *,
        prefetch: int,
        priority: int,
        on_gone: Callable[[], None] | None,
        turn: asyncio.Semaphore,
        on_over: Callable[[AmqpConsumer], None],
    ) -> None:
        self.queue = queue
        self._link = link
        self._on_delivery = on_delivery
        self._publish = publish
        self._prefetch = prefetch
        self._priority = priority
        self._on_gone = on_gone
        self._turn = turn
        self._on_over = on_over
        self._channel: ConsumeChannel | None = None
        self._outbox: channels.Outbox | None = None
        self._tag = ""
        self._changing = asyncio.Lock()
        """Held by whoever asks the broker to begin or end a consumer on the channel."""
        self._lost = asyncio.Event()
        self._over = False
        self._task: asyncio.Task[None] | None = None

    @property
    def active(self) -> bool:
        return not self._over and self._channel is not None and not self._lost.is_set()

    async def start(self) -> None:
        """Subscribes for the first time. Raises `QueueMissing`, `BrokerUnavailable`."""
        await self._subscribe(self._link.now())
        self._task = asyncio.create_task(self._keep(), name=f"consume {self.queue}")

    async def cancel(self) -> None:
        if self._over:
            return
        await self._end()
        async with self._changing:
            channel, tag = self._channel, self._tag
            if channel is not None and not channel.retired and not channel.is_closed:
                with suppress(RoostError):
                    # Failing means that the channel is closed: no deliveries either.
                    await asked(channel.basic_cancel(tag))
                channel.sink = None

    async def resize(self, prefetch: int) -> None:
        """A prefetch counts for consumers that begin after it: another one begins on the same
        channel, so that what is held stays valid, and then the old one ends."""
        async with self._changing:
            self._prefetch = prefetch
            channel, old = self._channel, self._tag
            if not self.active or channel is None or channel.retired or channel.is_closed:
                return
            # If one of these fails the channel is closed, and `_keep` subscribes again.
            await asked(channel.basic_qos(prefetch_count=prefetch))
            self._tag = await self._consume(channel)
            await asked(channel.basic_cancel(old))

    async def close(self) -> None:
        if not self._over:
            await self._end()
        await self._leave_channel()

    async def _leave_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None and not channel.retired:
            if self._outbox is not None and not channel.is_closed:
                # Acknowledged is acknowledged: not overtaken by the channel's end.
                await self._outbox.flushed()
            channel.sink = None
            await channel.retire()

    async def _end(self) -> None:
        """No subscribing again."""
        self._over = True
        self._on_over(self)
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _subscribe(self, session: Session) -> None:
        async with self._turn:
            channel = await asked(channels.open_consume(session.connection))
            lost = asyncio.Event()
            outbox = session.outbox

            def hand_on(received: DeliveredMessage) -> None:
                self._on_delivery(
                    AmqpDelivery(received, self.queue, channel, outbox, self._publish)
                )

            channel.sink = hand_on
            channel.closing.add_done_callback(lambda _: lost.set())
            # Inside this callback no request may be made: the channel's reader is calling.
            channel.on_consumer_cancel_callbacks.add(lambda _: lost.set())
            try:
                await asked(channel.basic_qos(prefetch_count=self._prefetch))
                tag = await self._consume(channel)
            except BaseException:
                await channel.retire()
                raise
            self._channel, self._outbox, self._tag, self._lost = channel, outbox, tag, lost

    async def _consume(self, channel: ConsumeChannel) -> str:
        tag = f"roost.{uuid.uuid4().hex}"
        arguments: dict[str, FieldValue] | None = None
        if self._priority:
            arguments = {"x-priority": self._priority}
        await asked(
            channel.basic_consume(self.queue, _unused, consumer_tag=tag, arguments=arguments)
        )
        return tag

    async def _keep(self) -> None:
        attempt = 0
        while True:
            await self._lost.wait()
            # 1. whatever the old channel still held returns to the queue
            await self._leave_channel()
            # 2. subscribe again, for as long as it takes
            session = await self._link.up()
            try:
                await self._subscribe(session)
            except QueueMissing:
                break
            except RoostError as error:
                attempt += 1
                log.warning("cannot consume again", queue=self.queue, error=str(error))
                await asyncio.sleep(backoff_s(attempt))
            else:
                attempt = 0
        log.info("the queue is gone", queue=self.queue)
        self._over = True
        self._on_over(self)
        if self._on_gone is not None:
            self._on_gone()


async def _unused(_: DeliveredMessage) -> None:
    """Never called: aiormq wants a callback, but `ConsumeChannel` hands messages to its sink."""
    raise BrokerUnavailable("deliveries do not pass the channel's sink")
