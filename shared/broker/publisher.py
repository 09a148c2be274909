"""Publishing with confirmation on one session, over a few channels."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from typing import Final

import structlog

from shared.broker import channels, encode
from shared.broker.channels import PublishChannel
from shared.broker.messages import outgoing_headers
from shared.broker.port import BrokerUnavailable, Message, PublishUncertain
from shared.broker.session import Session, asked, backoff_s
from shared.errors import RoostError

log = structlog.get_logger(__name__)

_CHANNELS: Final = 4
"""A refused publish closes its channel, and leaves what was under way on it uncertain; the
broker works on each channel in a process of its own."""


class Publisher:
    """The publish channels of one session. A channel that the broker closes is replaced."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._prefix = uuid.uuid4().hex
        self._channels: list[PublishChannel] = []
        self._turns = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        for _ in range(_CHANNELS):
            await self._add_channel()

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        message: Message,
        *,
        mandatory: bool,
        timeout_s: float,
    ) -> None:
        """As `port.Broker.publish`."""
        if self._session.outbox.full:
            raise BrokerUnavailable("the broker takes no more messages")
        channel = self._next_channel()
        # From here to send() without an await: tags count what is put on the wire, in order.
        frames = encode.publish_frames(
            channel.number,
            exchange,
            routing_key,
            message,
            headers=outgoing_headers(message),
            message_id=f"{self._prefix}.{channel.number}.{channel.delivery_tag + 1}",
            mandatory=mandatory,
            frame_max=self._session.connection.connection_tune.frame_max or 131072,
        )
        confirmed = channel.expect()
        self._session.outbox.send(channel, frames)
        timer = self._loop.call_later(timeout_s, _expire, confirmed, timeout_s)
        try:
            await confirmed
        finally:
            timer.cancel()

    def _next_channel(self) -> PublishChannel:
        for _ in range(len(self._channels)):
            channel = self._channels[next(self._turns) % len(self._channels)]
            if not channel.retired and not channel.is_closed:
                return channel
        raise BrokerUnavailable("no channel to the broker is open")

    async def _add_channel(self) -> None:
        channel = await asked(channels.open_publish(self._session.connection))
        self._channels.append(channel)
        channel.closing.add_done_callback(lambda _: self._on_closed(channel))

    def _on_closed(self, channel: PublishChannel) -> None:
        channel.retired = True
        channel.give_up("the channel closed before the broker confirmed")
        self._channels.remove(channel)
        if not self._session.lost.is_set():
            task = asyncio.create_task(self._replace(), name="replace a publish channel")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _replace(self) -> None:
        attempt = 0
        while not self._session.lost.is_set():
            try:
                await self._add_channel()
            except RoostError as error:
                attempt += 1
                log.warning("cannot open a publish channel", error=str(error))
                await asyncio.sleep(backoff_s(attempt))
            else:
                return


def _expire(confirmed: asyncio.Future[None], timeout_s: float) -> None:
    if not confirmed.done():
        confirmed.set_exception(
            PublishUncertain(f"the broker did not confirm within {timeout_s:.3g} s")
        )
