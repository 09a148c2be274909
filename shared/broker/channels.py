"""AMQP channels below aio-pika: one that publishes cheaply, one that consumes cheaply.

aio-pika keeps the connection. On it, these two bypass what costs most per message: a task and
several futures for each publish and each delivery. They override protected methods of aiormq's
`Channel`; should a release rename those, the contract tests fail at the first message.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

import aiormq
import structlog
from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.connection import Connection
from pamqp import commands as spec
from pamqp.header import ContentHeader

from shared.broker.port import ConfirmationLost, QueueFull, Unroutable
from shared.errors import Overloaded

log = structlog.get_logger(__name__)

_FRAME_BUFFER: Final = 256
"""Frames of a channel that may wait for its reader. aiormq's 10 make the connection's reader
and the channel's take turns for every third message."""

_OUTBOX_BYTES: Final = 64 * 1024 * 1024

Sink = Callable[[DeliveredMessage], None]
_C = TypeVar("_C", bound=aiormq.Channel)


class FastChannel(aiormq.Channel):
    """A channel whose publishes or acks travel by an `Outbox`."""

    retired = False
    """Set before the channel's close is put on the wire, by either side. A frame sent on it
    after that would cost the whole connection (504 CHANNEL_ERROR)."""

    async def _on_close_frame(self, frame: spec.Channel.Close) -> None:
        self.retired = True
        await super()._on_close_frame(frame)

    async def retire(self, timeout_s: float = 5.0) -> None:
        """Closes it; what was delivered on it and not acknowledged returns to its queue.
        Never fails: the alternative is that the connection is gone, to the same effect."""
        self.retired = True
        with suppress(Exception):
            await self.close(timeout=timeout_s)


class Outbox:
    """Frames of one connection on their way to its writer, many in one write.

    aiormq's writer takes items from a queue and writes their `payload`. The outbox puts itself
    there, and gives what has gathered when its turn comes: the busier the connection, the
    fewer the writes. It is asked at the very moment of writing, so that nothing is written on
    a channel that was retired meanwhile.
    """

    should_close = False
    should_drain = True

    def __init__(self, connection: Connection) -> None:
        self._queue = connection.write_queue
        self._loop = connection.loop
        self._pending: list[tuple[FastChannel, bytes]] = []
        self._bytes = 0
        self._queued = False
        self._closed = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def full(self) -> bool:
        """The broker does not take what we send (a stalled network, an alarm not told yet)."""
        return self._bytes > _OUTBOX_BYTES

    def send(self, channel: FastChannel, frames: bytes) -> None:
        if self._closed:
            return
        self._pending.append((channel, frames))
        self._bytes += len(frames)
        if not self._queued:
            self._enqueue()

    def _enqueue(self) -> None:
        try:
            self._queue.put_nowait(self)
            self._queued = True
        except asyncio.QueueFull:
            # Ten declarations wait to be written: rare, and over in a moment.
            self._queued = True
            self._loop.call_later(0.001, self._enqueue)

    async def flushed(self) -> None:
        """Returns when everything sent so far is written, or the connection is gone."""
        if self._queued and not self._closed:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def close(self) -> None:
        """The connection is gone."""
        self._closed = True
        self._pending.clear()
        self._wake()

    # --- what the writer asks of an item ---

    @property
    def payload(self) -> bytes:
        frames = b"".join(frames for channel, frames in self._pending if not channel.retired)
        self._pending.clear()
        return frames

    def drain(self) -> None:
        """The writer's buffer has room again."""
        self._queued = False
        self._bytes = sum(len(frames) for _, frames in self._pending)
        if self._pending:
            self._enqueue()
        else:
            self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class PublishChannel(FastChannel):
    """A confirm-mode channel whose confirmations are plain futures by delivery tag."""

    def __init__(self, connection: Connection, number: int) -> None:
        super().__init__(connection, number, publisher_confirms=True, frame_buffer=_FRAME_BUFFER)
        self.pending: dict[int, asyncio.Future[None]] = {}
        """In the order of the tags."""

    def expect(self) -> asyncio.Future[None]:
        """The confirmation of the publish that is put on the wire next: None, or
        `QueueFull`, `Unroutable`, `PublishUncertain`. No other may be sent in between."""
        self.delivery_tag += 1
        future: asyncio.Future[None] = self.loop.create_future()
        self.pending[self.delivery_tag] = future
        return future

    def give_up(self, reason: str) -> None:
        """No more confirmations come: the channel or its connection is gone."""
        pending, self.pending = self.pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(ConfirmationLost(reason))

    async def _on_confirm_frame(self, frame: spec.Basic.Ack | spec.Basic.Nack) -> None:  # type: ignore[override]
        tag = frame.delivery_tag or 0
        if frame.multiple:
            tags = list(itertools.takewhile(lambda pending: pending <= tag, self.pending))
        else:
            tags = [tag]
        confirmed = isinstance(frame, spec.Basic.Ack)
        for each in tags:
            future = self.pending.pop(each, None)
            if future is None or future.done():
                continue
            if confirmed:
                future.set_result(None)
            else:
                future.set_exception(QueueFull("the queue is full"))

    async def _on_return_frame(self, frame: spec.Basic.Return) -> None:
        header = await self._get_frame()
        assert isinstance(header, ContentHeader)
        message = await self._read_content(frame, header)
        # We sent the message id: it ends with the tag. The basic.ack of the same tag follows.
        tag = int((message.header.properties.message_id or "0").rpartition(".")[2])
        future = self.pending.get(tag)
        if future is not None and not future.done():
            future.set_exception(
                Unroutable(f"no queue takes {frame.exchange or 'queue'} {frame.routing_key!r}")
            )


class ConsumeChannel(FastChannel):
    """A channel with one consumer, whose deliveries go to `sink` within the channel's reader:
    in order, and without a task each."""

    def __init__(self, connection: Connection, number: int) -> None:
        super().__init__(connection, number, publisher_confirms=False, frame_buffer=_FRAME_BUFFER)
        self.sink: Sink | None = None

    async def _on_deliver_frame(self, frame: spec.Basic.Deliver) -> None:
        header = await self._get_frame()
        assert isinstance(header, ContentHeader)
        message = await self._read_content(frame, header)
        if self.sink is None:
            return
        try:
            self.sink(message)
        except Exception:
            # It must not end the reader; the message stays held until the channel closes.
            log.exception("a delivery handler failed", routing_key=frame.routing_key)


def free_number(connection: Connection) -> int:
    """The lowest channel number that is not in use. aiormq would count upwards beyond what the
    broker allows, and lose the connection. Raises `Overloaded` when there is none."""
    limit = connection.connection_tune.channel_max or 65535
    for number in range(1, limit + 1):
        if number not in connection.channels:
            return number
    raise Overloaded(f"all {limit} channels of the connection to the broker are in use")


async def open_publish(connection: Connection) -> PublishChannel:
    return await _open(connection, PublishChannel(connection, free_number(connection)))


async def open_consume(connection: Connection) -> ConsumeChannel:
    return await _open(connection, ConsumeChannel(connection, free_number(connection)))


async def open_admin(connection: Connection) -> AbstractChannel:
    """A channel for declarations; whatever closes it costs nobody else."""
    number = free_number(connection)
    return await connection.channel(channel_number=number, publisher_confirms=False)


async def _open(connection: Connection, channel: _C) -> _C:
    # As Connection.channel() does, which cannot be told of another class. No await stands
    # between the choice of the number and this.
    connection.channels[channel.number] = channel
    await channel.open()
    return channel
