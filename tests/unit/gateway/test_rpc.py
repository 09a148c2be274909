"""Requests out, replies in: what happens at the edges of a publish."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import msgspec
import pytest

from services.gateway.metrics import Metrics
from services.gateway.rpc import Call, Rpc
from shared import packs
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import (
    BrokerUnavailable,
    ConfirmationLost,
    Message,
    PublishUncertain,
    QueueFull,
    Unroutable,
)
from shared.errors import DeadlineExceeded, Overloaded, Unavailable
from shared.names import HEADER_CODE, UNROUTED
from tests.gateway_rig import until


class Moody(MemoryBroker):
    """A broker that delivers, or not, and then says what it likes."""

    mood: Exception | None = None
    delivers = True
    published = 0

    async def publish(self, exchange, routing_key, message, **options):
        self.published += 1
        if self.delivers:
            await super().publish(exchange, routing_key, message, **options)
        if self.mood is not None:
            raise self.mood


@pytest.fixture
def broker():
    return Moody(MemoryExchange(), "gateway")


@pytest.fixture
async def rpc(broker):
    made = Rpc(
        broker, "test", "n.", Metrics(),
        publish_timeout_s=1, reply_expires_s=60, reply_prefetch=10,
    )  # fmt: skip
    await broker.start()
    tasks = [
        asyncio.create_task(made.keep_reply_queue()),
        asyncio.create_task(made.acknowledge_replies()),
    ]
    await until(lambda: made.ready)
    yield made
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await made.close()


def request(seconds: float = 10.0, pack: int = 1) -> Call:
    deadline = asyncio.get_running_loop().time() + seconds
    return Call(
        correlation_id=uuid.uuid4().hex,
        routing_key="bert",
        body=b"{}",
        header_length=None,
        deadline=deadline,
        pack=pack,
    )


async def answer_all(broker, body=b"answer"):
    """A worker that answers whatever lies in `UNROUTED`."""

    def on_delivery(delivery):
        reply = Message(
            body=body,
            headers={HEADER_CODE: "ok"},
            correlation_id=delivery.message.correlation_id,
        )
        broker.server.publish("", delivery.message.reply_to, reply, True)

    await broker.consume(UNROUTED, on_delivery, prefetch=1000)


async def test_an_uncertain_publish_is_awaited(rpc, broker):
    """It may have arrived: when it did, its answer is the answer."""
    await answer_all(broker)
    broker.mood = PublishUncertain("no confirmation in time")
    assert (await rpc.call(request())).body == b"answer"


async def test_an_uncertain_publish_that_was_lost_ends_at_the_deadline(rpc, broker):
    """When it did not, the deadline ends it."""
    broker.mood = PublishUncertain("no confirmation in time")
    broker.delivers = False
    with pytest.raises(DeadlineExceeded):
        await rpc.call(request(0.05))
    assert len(rpc.pending) == 0


async def test_what_was_under_way_when_the_connection_was_lost_is_sent_again(rpc, broker):
    """Nobody knows whether it arrived: once the connection is back it is sent once more."""
    await answer_all(broker)
    rpc.settle_s = 0.0
    broker.mood, broker.delivers = ConfirmationLost("gone"), False
    call = asyncio.create_task(rpc.call(request(60)))
    others = [asyncio.create_task(rpc.call(request(60, pack=8))) for _ in range(3)]
    await until(lambda: len(rpc.pending) == 4)
    broker.mood, broker.delivers = None, True
    assert [each.body for each in await asyncio.gather(call, *others)] == [b"answer"] * 4


async def test_what_was_answered_meanwhile_is_not_sent_again(rpc, broker):
    """Of the others it would be computed for nothing."""
    await answer_all(broker)
    rpc.settle_s = 0.0
    broker.mood = ConfirmationLost("gone")
    assert (await rpc.call(request())).body == b"answer"
    await until(lambda: not rpc._sending)
    assert broker.published == 1


@pytest.mark.parametrize(
    ("mood", "error"),
    [
        (QueueFull("full"), Overloaded),
        (BrokerUnavailable("away"), Unavailable),
        (Unroutable("nowhere"), Unavailable),
    ],
)
async def test_a_refused_publish_is_told_at_once(rpc, broker, mood, error):
    """In the caller's terms, and nothing stays in the table."""
    broker.mood = mood
    broker.delivers = False
    with pytest.raises(error):
        await rpc.call(request())
    assert len(rpc.pending) == 0


async def test_a_cancelled_call_leaves_the_others(rpc, broker):
    """One caller goes before the reply; the other is answered."""
    leaver = asyncio.create_task(rpc.call(request()))
    stayer = asyncio.create_task(rpc.call(request()))
    await until(lambda: len(rpc.pending) == 2)
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    assert len(rpc.pending) == 1
    await answer_all(broker)
    assert (await stayer).body == b"answer"


async def test_replies_are_acknowledged(rpc, broker):
    """More replies than the prefetch get through, so each was acknowledged."""
    await answer_all(broker)
    assert len(await asyncio.gather(*(rpc.call(request()) for _ in range(50)))) == 50
    (replies,) = (each for each in broker.consumers if each.queue == rpc.reply_queue)
    await until(lambda: not replies.held)


async def test_without_a_reply_queue_nothing_is_sent(rpc, broker):
    """A request whose answer could not arrive is refused instead."""
    broker.lose()
    with pytest.raises(Unavailable):
        await rpc.call(request())
    assert not broker.server.queues[UNROUTED].ready
    broker.restore()
    assert rpc.ready


class Slow(Moody):
    """Confirms nothing until it is let."""

    def __init__(self, server, name):
        super().__init__(server, name)
        self.let = asyncio.Event()
        self.sent: list[list[str]] = []

    async def publish(self, exchange, routing_key, message, **options):
        singles = packs.members(message) if packs.is_pack(message) else [message]
        self.sent.append([single.correlation_id for single in singles])
        await self.let.wait()
        await super().publish(exchange, routing_key, message, **options)


@pytest.fixture
def slow():
    return Slow(MemoryExchange(), "gateway")


@pytest.fixture
async def packing(slow):
    """An `Rpc` and a task for each of its calls: the first one's publish is under way."""
    made = Rpc(
        slow, "test", "n.", Metrics(),
        publish_timeout_s=10, reply_expires_s=60, reply_prefetch=10,
    )  # fmt: skip
    made.patience_s = 60.0
    await slow.start()
    tasks = [
        asyncio.create_task(made.keep_reply_queue()),
        asyncio.create_task(made.acknowledge_replies()),
    ]
    await until(lambda: made.ready)
    yield made
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await made.close()


async def ask(rpc, *calls):
    """Asks them one after the other; all wait for their answers when this returns."""
    before = len(rpc.pending)
    tasks = [asyncio.create_task(rpc.call(call)) for call in calls]
    await until(lambda: len(rpc.pending) == before + len(calls))
    return tasks


async def answer_packs(broker):
    """A worker that answers all of a message in one."""

    def on_delivery(delivery):
        message = delivery.message
        asked = packs.members(message) if packs.is_pack(message) else [message]
        replies = [
            Message(body=b"to " + each.correlation_id.encode(), correlation_id=each.correlation_id)
            for each in asked
        ]
        broker.server.publish("", message.reply_to, packs.pack(replies), True)

    await broker.consume(UNROUTED, on_delivery, prefetch=1000)


async def test_a_slow_confirmation_holds_nobody_up(packing, slow):
    """What waits goes out beside it after a moment, together."""
    packing.patience_s = 0.01
    calls = [request(pack=32) for _ in range(3)]
    tasks = await ask(packing, *calls)
    await until(lambda: len(slow.sent) == 2)
    assert slow.sent[1] == [call.correlation_id for call in calls[1:]]
    await answer_packs(slow)
    slow.let.set()
    await asyncio.gather(*tasks)


async def test_what_comes_during_a_publish_goes_together(packing, slow):
    """The first one at once and alone; answers come in packs, each to who asked."""
    await answer_packs(slow)
    calls = [request(pack=32) for _ in range(5)]
    tasks = await ask(packing, *calls)
    ids = [call.correlation_id for call in calls]
    assert slow.sent == [ids[:1]]
    slow.let.set()
    answers = await asyncio.gather(*tasks)
    assert slow.sent == [ids[:1], ids[1:]]
    assert [answer.body.decode() for answer in answers] == [f"to {each}" for each in ids]


async def test_models_priorities_and_what_does_not_batch_do_not_mix(packing, slow):
    """Each lane is by itself, and where a model takes one request at a time nothing waits."""
    await answer_packs(slow)
    calls = [
        request(pack=32), msgspec.structs.replace(request(pack=32), priority=9),
        msgspec.structs.replace(request(pack=32), routing_key="other"), request(pack=1),
    ]  # fmt: skip
    tasks = await ask(packing, *calls)
    assert slow.sent == [[call.correlation_id] for call in calls]
    slow.let.set()
    await asyncio.gather(*tasks)


async def test_who_goes_away_while_waiting_is_not_sent(packing, slow):
    """Nor who ran out of time; the others are answered."""
    await answer_packs(slow)
    calls = [request(pack=32), request(pack=32), request(0.05, pack=32), request(pack=32)]
    first, leaver, late, stayer = await ask(packing, *calls)
    leaver.cancel()
    with pytest.raises(DeadlineExceeded):
        await late
    slow.let.set()
    await asyncio.gather(first, stayer)
    assert slow.sent == [[calls[0].correlation_id], [calls[3].correlation_id]]


async def test_the_one_whose_publish_is_under_way_takes_none_along(packing, slow):
    """It is cancelled, and those that waited for it to end go out."""
    await answer_packs(slow)
    first, *others = await ask(packing, *(request(pack=32) for _ in range(3)))
    first.cancel()
    slow.let.set()
    assert len(await asyncio.gather(*others)) == 2
    with pytest.raises(asyncio.CancelledError):
        await first


@pytest.mark.parametrize(
    ("mood", "error"),
    [(QueueFull("full"), Overloaded), (BrokerUnavailable("away"), Unavailable)],
)
async def test_each_member_learns_that_its_pack_was_refused(packing, slow, mood, error):
    """Each by an error of its own, since each is told its own time to come again."""
    tasks = await ask(packing, *(request(pack=32) for _ in range(4)))
    slow.mood, slow.delivers = mood, False
    slow.let.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in errors] == [error] * 4
    assert len({id(each) for each in errors}) == 4
    assert len(packing.pending) == 0


async def test_an_uncertain_pack_is_awaited(packing, slow):
    """It may have arrived: the answers come, to all of them."""
    await answer_packs(slow)
    tasks = await ask(packing, *(request(pack=32) for _ in range(3)))
    slow.mood = PublishUncertain("no confirmation in time")
    slow.let.set()
    assert len(await asyncio.gather(*tasks)) == 3


async def test_a_broken_pack_of_replies_costs_nobody_else_an_answer(packing, slow):
    """It is acknowledged and counted; what comes after it is read."""
    slow.let.set()
    (waiting,) = await ask(packing, request())
    broken = Message(body=b"rubbish", content_type=packs.CONTENT_TYPE)
    slow.server.publish("", packing.reply_queue, broken, True)
    await answer_packs(slow)
    assert (await waiting).body.startswith(b"to ")
    (replies,) = (each for each in slow.consumers if each.queue == packing.reply_queue)
    await until(lambda: not replies.held)
