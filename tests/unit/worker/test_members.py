"""The members of a pack: each ends by itself, and the pack's message with the last of them."""

from __future__ import annotations

import pytest

from services.worker.members import Pack
from shared import packs
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import BrokerUnavailable, Message
from shared.names import DEAD, HEADER_DEAD_REASON

QUEUE = "roost.model.m.1"


def single(number: int, **fields) -> Message:
    return Message(
        body=bytes([number]), correlation_id=str(number), reply_to="roost.reply.t", **fields
    )


class Rig:
    """A broker with one pack, delivered."""

    def __init__(self) -> None:
        self.server = MemoryExchange()
        self.broker = MemoryBroker(self.server, "test")
        self.deliveries = []
        self.settled = []

    async def deliver(self, *messages: Message) -> Pack:
        await self.broker.start()
        await self.broker.declare_queue(QUEUE)
        await self.broker.publish("", QUEUE, packs.pack(messages))
        self.consumer = await self.broker.consume(QUEUE, self.deliveries.append, prefetch=1)
        await self.broker.publish("", DEAD, Message(body=b"the loop's turn"))

        async def publish(exchange, key, message):
            await self.broker.publish(exchange, key, message)

        return Pack(self.deliveries[0], publish, self.settled.append)

    def ready(self, queue: str = QUEUE) -> list[Message]:
        """What lies in the queue; of packs their members."""
        found: list[Message] = []
        for entry in sorted(self.server.queues[queue].ready):
            message = entry.message
            found += packs.members(message) if packs.is_pack(message) else [message]
        return found

    @property
    def held(self) -> int:
        return len(self.consumer.held)


async def test_a_pack_is_acknowledged_with_its_last_member():
    """Not before, and a second answer of one member does not stand for another's."""
    rig = Rig()
    pack = await rig.deliver(single(1), single(2), single(3))
    first, second, third = pack.members
    assert [each.message.correlation_id for each in pack.members] == ["1", "2", "3"]
    assert (first.queue, first.redelivered, first.malformed) == (QUEUE, False, None)
    for answered in (second, second, first, first):
        await answered.ack()
        assert rig.held == 1
    await third.ack()
    assert (rig.held, rig.ready()) == (0, [])
    assert rig.settled == [False, False, True]


async def test_what_is_returned_comes_again_without_the_others():
    """With what is left of its time, before the pack is acknowledged."""
    rig = Rig()
    pack = await rig.deliver(*(single(n, expiration_ms=60_000) for n in (1, 2, 3, 4)))
    first, second, third, fourth = pack.members
    await second.requeue()
    await first.ack()
    await fourth.requeue()
    assert rig.ready() == []
    rig.consumer.unsubscribe()
    await third.ack()
    assert [message.correlation_id for message in rig.ready()] == ["2", "4"]
    assert all(0 < message.expiration_ms <= 60_000 for message in rig.ready())
    assert rig.held == 0


async def test_a_pack_of_which_nothing_was_answered_returns_as_it_is():
    """To its own place in the queue."""
    rig = Rig()
    pack = await rig.deliver(single(1), single(2))
    rig.consumer.unsubscribe()
    for member in pack.members:
        await member.requeue()
    assert [message.correlation_id for message in rig.ready()] == ["1", "2"]
    assert rig.held == 0


async def test_a_pack_returns_whole_when_its_rest_cannot_be_published():
    """Some are answered twice then; none is lost."""
    rig = Rig()
    pack = await rig.deliver(single(1), single(2))
    rig.consumer.unsubscribe()
    first, second = pack.members
    await first.requeue()
    rig.broker.blocked = "alarm"
    await second.ack()
    assert [message.correlation_id for message in rig.ready()] == ["1", "2"]


async def test_a_buried_member_takes_none_along():
    """Its dead letter is a single message; while it cannot be published it is held."""
    rig = Rig()
    pack = await rig.deliver(single(1), single(2))
    first, second = pack.members
    rig.broker.blocked = "alarm"
    with pytest.raises(BrokerUnavailable):
        await first.dead_letter("it ends engines")
    rig.broker.blocked = None
    await first.dead_letter("it ends engines")
    await second.ack()
    assert rig.held == 0
    *_, letter = rig.ready(DEAD)
    assert (letter.body, letter.headers[HEADER_DEAD_REASON]) == (b"\x01", "it ends engines")


async def test_what_is_no_pack_raises():
    """Whoever delivers it buries it."""
    rig = Rig()
    broken = Message(body=b"rubbish", content_type=packs.CONTENT_TYPE)
    with pytest.raises(packs.BadPack):
        await rig.deliver(broken)
