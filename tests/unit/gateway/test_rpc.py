"""Requests out, replies in: what happens at the edges of a publish."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import pytest

from services.gateway.metrics import Metrics
from services.gateway.rpc import Call, Rpc
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import BrokerUnavailable, Message, PublishUncertain, QueueFull, Unroutable
from shared.errors import DeadlineExceeded, Overloaded, Unavailable
from shared.names import HEADER_CODE, UNROUTED
from tests.gateway_rig import until


class Moody(MemoryBroker):
    """A broker that delivers, or not, and then says what it likes."""

    mood: Exception | None = None
    delivers = True

    async def publish(self, exchange, routing_key, message, **options):
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


def request(seconds: float = 10.0) -> Call:
    deadline = asyncio.get_running_loop().time() + seconds
    return Call(
        correlation_id=uuid.uuid4().hex,
        routing_key="bert",
        body=b"{}",
        header_length=None,
        deadline=deadline,
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
