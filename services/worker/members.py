"""A pack from a queue, as the single deliveries of its members.

The rest of the worker knows single messages only: each member is acknowledged, returned or buried
by itself, and the pack's message once the last of them is. What is to be returned goes into the
queue again as messages of its own, confirmed before the pack is acknowledged. If that cannot be,
the whole pack returns: some members are then answered twice, which askers expect.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from shared import packs
from shared.broker.messages import dead_letter
from shared.broker.port import Delivery, Message
from shared.errors import InvalidRequest, RoostError
from shared.names import DEAD

log = structlog.get_logger(__name__)

Publish = Callable[[str, str, Message], Awaitable[None]]


class Pack:
    """One delivery, until its last member is settled."""

    def __init__(
        self, delivery: Delivery, publish: Publish, settled: Callable[[bool], None]
    ) -> None:
        """`settled` is told of each member, and whether it was the last. Raises
        `packs.BadPack`."""
        self.delivery = delivery
        self.members = [
            MemberDelivery(self, message) for message in packs.members(delivery.message)
        ]
        self._publish = publish
        self._settled = settled
        self.arrived = time.monotonic()
        self._left = len(self.members)
        self._back: list[Message] = []

    async def settle(self, *, back: Message | None = None) -> None:
        """One member less. Only the last one has something to wait for."""
        self._left -= 1
        if back is not None:
            self._back.append(back)
        last = not self._left
        if last:
            await self._end()
        self._settled(last)

    async def bury(self, message: Message, reason: str) -> None:
        """Raises what `Broker.publish` raises."""
        told = self.delivery
        letter = dead_letter(message, told.queue, told.routing_key, reason)
        try:
            await self._publish(DEAD, "", letter)
        except InvalidRequest:
            # What it says of itself cannot be said in AMQP: the body goes alone.
            bare = dead_letter(Message(body=message.body), told.queue, told.routing_key, reason)
            await self._publish(DEAD, "", bare)

    async def _end(self) -> None:
        if len(self._back) == len(self.members):
            await self.delivery.requeue()
            return
        try:
            if self._back:
                await self._return()
        except RoostError as error:
            log.warning("pack_given_back", queue=self.delivery.queue, error=str(error))
            await self.delivery.requeue()
            return
        await self.delivery.ack()

    async def _return(self) -> None:
        try:
            await self._publish("", self.delivery.queue, packs.pack(self._back))
        except InvalidRequest as error:
            for message in self._back:
                await self.bury(message, str(error))


class MemberDelivery:
    """As `broker.port.Delivery`. A second answer does nothing."""

    __slots__ = ("_open", "malformed", "message", "pack", "queue", "redelivered", "routing_key")

    def __init__(self, pack: Pack, message: Message) -> None:
        self.pack = pack
        self.message = message
        self.queue = pack.delivery.queue
        self.routing_key = pack.delivery.routing_key
        self.redelivered = pack.delivery.redelivered
        self.malformed: str | None = None
        self._open = True

    async def ack(self) -> None:
        if self._open:
            self._open = False
            await self.pack.settle()

    async def requeue(self) -> None:
        """It keeps what is left of its time."""
        if not self._open:
            return
        self._open = False
        message = self.message
        if message.expiration_ms is not None:
            left = message.expiration_ms - int((time.monotonic() - self.pack.arrived) * 1e3)
            message = msgspec.structs.replace(message, expiration_ms=max(left, 1))
        await self.pack.settle(back=message)

    async def dead_letter(self, reason: str) -> None:
        if self._open:
            await self.pack.bury(self.message, reason)
            await self.ack()
