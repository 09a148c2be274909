"""The laws of the broker port, kept by RabbitMQ's adapter and by the twin in memory alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Protocol
from urllib.parse import quote

import pytest

from roost.local.rabbit import RabbitNode
from shared import names
from shared.broker.amqp import AmqpBroker
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.policies import vhost_of
from shared.broker.port import (
    Broker,
    BrokerUnavailable,
    Delivery,
    Message,
    QueueFull,
    QueueMissing,
    Unroutable,
)
from shared.errors import InvalidRequest, TooLarge

QUEUE = "roost.model.bert.1"


async def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    """Waits for a condition by asking it."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


class Inbox:
    """Collects what a consumer is handed."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Delivery] = asyncio.Queue()

    def __call__(self, delivery: Delivery) -> None:
        self.queue.put_nowait(delivery)

    async def next(self) -> Delivery:
        return await asyncio.wait_for(self.queue.get(), 15)

    async def bodies(self, count: int) -> list[bytes]:
        return [(await self.next()).message.body for _ in range(count)]


class Rig(Protocol):
    """A message broker that brokers can be opened on, and that can be hurt."""

    async def open(self, name: str) -> Broker: ...
    async def cut(self) -> None:
        """Breaks every connection; they come back by themselves."""

    def limit(self, queue: str, length: int) -> None: ...


class MemoryRig:
    def __init__(self) -> None:
        self.server = MemoryExchange()
        self.brokers: list[MemoryBroker] = []

    async def open(self, name: str) -> Broker:
        broker = MemoryBroker(self.server, name)
        await broker.start()
        self.brokers.append(broker)
        return broker

    async def cut(self) -> None:
        for broker in self.brokers:
            broker.lose()
            asyncio.get_running_loop().call_later(0.05, broker.restore)

    def limit(self, queue: str, length: int) -> None:
        self.server.max_length[queue] = length


class AmqpRig:
    def __init__(self, node: RabbitNode, url: str) -> None:
        self.node = node
        self.url = url
        self.vhost = vhost_of(url)
        self.brokers: list[AmqpBroker] = []

    async def open(self, name: str) -> Broker:
        broker = AmqpBroker(self.url, name)
        await broker.start()
        self.brokers.append(broker)
        return broker

    async def cut(self) -> None:
        await asyncio.to_thread(
            self.node.ctl, "close_all_connections", "--vhost", self.vhost, "test"
        )
        await until(lambda: all(broker.connected for broker in self.brokers))

    def limit(self, queue: str, length: int) -> None:
        policy = {
            "pattern": f"^{queue}$",
            "apply-to": "queues",
            "definition": {"max-length": length, "overflow": "reject-publish"},
        }
        path = f"/api/policies/{quote(self.vhost, safe='')}/test"
        self.node.api("PUT", path, json.dumps(policy).encode())


@pytest.fixture(params=["memory", pytest.param("amqp", marks=pytest.mark.services)])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    made: MemoryRig | AmqpRig
    if request.param == "memory":
        made = MemoryRig()
    else:
        node = request.getfixturevalue("rabbit_node")
        made = AmqpRig(node, request.getfixturevalue("amqp_url"))
    yield made
    for broker in made.brokers:
        await broker.close()


@pytest.fixture
async def broker(rig: Rig) -> Broker:
    """A started broker with one queue."""
    opened = await rig.open("test")
    await opened.declare_queue(QUEUE)
    return opened


async def test_message_arrives_as_it_was_sent(broker: Broker) -> None:
    """Body and every property that Roost uses reach the consumer unchanged."""
    inbox = Inbox()
    await broker.consume(QUEUE, inbox, prefetch=10)
    sent = Message(
        body=bytes(range(256)) * 2000,
        headers={"text": "ünï", "int": -(2**62), "float": 0.5, "yes": True, "raw": b"\xff",
                 "none": None},
        reply_to="roost.reply.gw-1",
        correlation_id="c-1",
        content_type="application/json",
        expiration_ms=60_000,
        priority=3,
        persistent=False,
    )  # fmt: skip
    await broker.publish("", QUEUE, sent)
    delivery = await inbox.next()
    got = delivery.message
    assert got.body == sent.body
    assert got.headers == sent.headers
    assert got.headers["yes"] is True
    assert (got.reply_to, got.correlation_id) == (sent.reply_to, sent.correlation_id)
    assert (got.content_type, got.expiration_ms) == (sent.content_type, sent.expiration_ms)
    assert (got.priority, got.persistent) == (3, False)
    assert (delivery.queue, delivery.routing_key) == (QUEUE, QUEUE)
    assert not delivery.redelivered
    assert delivery.malformed is None


async def test_empty_body_and_no_properties(broker: Broker) -> None:
    """An empty message is a message."""
    inbox = Inbox()
    await broker.consume(QUEUE, inbox, prefetch=10)
    await broker.publish("", QUEUE, Message(body=b""))
    got = (await inbox.next()).message
    assert got.body == b""
    assert got.headers == {}
    assert (got.reply_to, got.correlation_id) == (None, None)
    assert (got.expiration_ms, got.priority) == (None, None)
    assert got.persistent


async def test_message_id_is_fresh_and_the_producers_is_kept(broker: Broker) -> None:
    """The property is new at each publish; the producer's own id travels in a header."""
    inbox = Inbox()
    await broker.consume(QUEUE, inbox, prefetch=10)
    message = Message(body=b"x", message_id="mine")
    await broker.publish("", QUEUE, message)
    await broker.publish("", QUEUE, message)
    first, second = await inbox.next(), await inbox.next()
    assert len({"mine", first.message.message_id, second.message.message_id}) == 3
    assert first.message.headers[names.HEADER_CLIENT_MESSAGE_ID] == "mine"
    await broker.publish("", QUEUE, first.message)
    third = await inbox.next()
    assert third.message.headers[names.HEADER_CLIENT_MESSAGE_ID] == "mine"


async def test_a_prefetch_can_be_changed(broker: Broker) -> None:
    """What is held stays held and can be acknowledged; more comes, or less, from then on."""
    inbox = Inbox()
    consumer = await broker.consume(QUEUE, inbox, prefetch=1)
    for number in range(8):
        await broker.publish("", QUEUE, Message(body=bytes([number])))
    first = await inbox.next()
    assert await broker.depth(QUEUE) == 7
    await consumer.resize(4)
    more = [await inbox.next() for _ in range(3)]
    await first.ack()
    fourth = await inbox.next()
    assert [each.message.body[0] for each in (first, *more, fourth)] == [0, 1, 2, 3, 4]
    assert consumer.active
    await consumer.cancel()
    for each in (*more, fourth):
        await each.ack()
    await consumer.resize(2)
    await consumer.close()
    assert await broker.depth(QUEUE) == 3


async def test_bound_key_reaches_the_queue(broker: Broker) -> None:
    """A routing key of the infer exchange reaches the queue that is bound, twice or once."""
    await broker.bind(QUEUE, "bert")
    await broker.bind(QUEUE, "bert")
    await broker.publish(names.INFER_EXCHANGE, "bert", Message(body=b"x"))
    assert await broker.depth(QUEUE) == 1
    assert await broker.depth(names.UNROUTED) == 0


async def test_unbound_key_falls_through(broker: Broker) -> None:
    """What no queue is bound for lands in UNROUTED, with its routing key, as a success."""
    await broker.bind(QUEUE, "bert")
    await broker.unbind(QUEUE, "bert")
    await broker.unbind(QUEUE, "bert")
    await broker.unbind("roost.model.missing.1", "bert")
    inbox = Inbox()
    await broker.consume(names.UNROUTED, inbox, prefetch=1)
    await broker.publish(names.INFER_EXCHANGE, "bert", Message(body=b"x"))
    delivery = await inbox.next()
    assert delivery.routing_key == "bert"
    await delivery.ack()


async def test_binding_a_missing_queue_is_refused(broker: Broker) -> None:
    """There is nothing to bind."""
    with pytest.raises(QueueMissing):
        await broker.bind("roost.model.missing.1", "missing")
    await broker.bind(QUEUE, "bert")  # and nobody else pays for it


async def test_unroutable(broker: Broker) -> None:
    """A mandatory message for a queue that is not there is an error; another is dropped."""
    with pytest.raises(Unroutable):
        await broker.publish("", "roost.reply.gone", Message(body=b"x"))
    await broker.publish("", "roost.reply.gone", Message(body=b"x"), mandatory=False)
    await broker.publish("", QUEUE, Message(body=b"x"))


async def test_many_publishes_at_once_each_get_their_own_answer(broker: Broker) -> None:
    """Concurrent publishes do not mix up their outcomes."""
    targets = [QUEUE if n % 3 else "roost.reply.gone" for n in range(300)]
    outcomes = await asyncio.gather(
        *(broker.publish("", target, Message(body=b"x")) for target in targets),
        return_exceptions=True,
    )
    for target, outcome in zip(targets, outcomes, strict=True):
        assert (outcome is None) if target == QUEUE else isinstance(outcome, Unroutable)
    assert await broker.depth(QUEUE) == 200


async def test_full_queue_rejects(rig: Rig, broker: Broker) -> None:
    """A queue at its limit rejects the publish, and keeps what it has."""
    rig.limit(QUEUE, 3)
    outcomes: list[bool] = []

    async def fill() -> bool:
        try:
            await broker.publish("", QUEUE, Message(body=b"x"))
        except QueueFull:
            return True
        outcomes.append(True)
        return False

    async with asyncio.timeout(10):
        while not await fill():  # a policy takes effect in a moment, not at once
            pass
    assert await broker.depth(QUEUE) == len(outcomes) >= 3


async def test_what_cannot_be_sent(broker: Broker) -> None:
    """A property beyond its type, or a body beyond the broker's limit, is the caller's error
    and nobody else's."""
    with pytest.raises(TooLarge):
        await broker.publish("", QUEUE, Message(body=bytes(17 * 1024 * 1024)))
    await broker.publish("", QUEUE, Message(body=b"x"))
    if isinstance(broker, AmqpBroker):
        for bad in (
            Message(body=b"", correlation_id="x" * 256),
            Message(body=b"", headers={"n": 2**63}),
            Message(body=b"", headers={"n": "x" * 20_000}),
            Message(body=b"", reply_to="\ud800"),
        ):
            with pytest.raises(InvalidRequest):
                await broker.publish("", QUEUE, bad)
        await broker.publish("", QUEUE, Message(body=b"x"))


async def test_prefetch_bounds_what_is_held(broker: Broker) -> None:
    """No more than `prefetch` unanswered; an answer lets the next one in; order is kept."""
    inbox = Inbox()
    await broker.consume(QUEUE, inbox, prefetch=2)
    for n in range(5):
        await broker.publish("", QUEUE, Message(body=bytes([n])))
    first, second = await inbox.next(), await inbox.next()
    assert await broker.depth(QUEUE) == 3
    assert inbox.queue.empty()
    await first.ack()
    third = await inbox.next()
    assert [each.message.body for each in (first, second, third)] == [b"\0", b"\1", b"\2"]


async def test_round_robin_and_priority(broker: Broker) -> None:
    """Equal consumers share; one of higher priority is served first while it has room."""
    one, two, first = Inbox(), Inbox(), Inbox()
    await broker.consume(QUEUE, one, prefetch=10)
    await broker.consume(QUEUE, two, prefetch=10)
    for n in range(6):
        await broker.publish("", QUEUE, Message(body=bytes([n])))
    await until(lambda: one.queue.qsize() + two.queue.qsize() == 6)
    assert one.queue.qsize() == two.queue.qsize() == 3
    await broker.consume(QUEUE, first, prefetch=2, priority=5)
    for n in range(3):
        await broker.publish("", QUEUE, Message(body=bytes([n])))
    await until(lambda: one.queue.qsize() + two.queue.qsize() + first.queue.qsize() == 9)
    assert first.queue.qsize() == 2


async def test_requeue_keeps_its_place(broker: Broker) -> None:
    """A returned message comes again before those behind it, marked as redelivered."""
    inbox = Inbox()
    await broker.consume(QUEUE, inbox, prefetch=1)
    for n in range(3):
        await broker.publish("", QUEUE, Message(body=bytes([n])))
    first = await inbox.next()
    await first.requeue()
    again = await inbox.next()
    assert (again.message.body, again.redelivered) == (b"\0", True)
    await again.ack()
    following = await inbox.next()
    assert (following.message.body, following.redelivered) == (b"\1", False)


async def test_second_answer_does_nothing(broker: Broker) -> None:
    """Answering twice harms nobody."""
    inbox = Inbox()
    await broker.consume(QUEUE, inbox, prefetch=1)
    await broker.publish("", QUEUE, Message(body=b"0"))
    await broker.publish("", QUEUE, Message(body=b"1"))
    first = await inbox.next()
    await first.ack()
    await first.ack()
    await first.requeue()
    await first.dead_letter("no")
    assert (await inbox.next()).message.body == b"1"
    assert await broker.depth(names.DEAD) == 0


async def test_dead_letter(broker: Broker) -> None:
    """The message moves to DEAD with where it was and why, and is acknowledged."""
    inbox, dead = Inbox(), Inbox()
    await broker.bind(QUEUE, "bert")
    consumer = await broker.consume(QUEUE, inbox, prefetch=1)
    await broker.consume(names.DEAD, dead, prefetch=1)
    await broker.publish(
        names.INFER_EXCHANGE,
        "bert",
        Message(body=b"x", headers={"k": "v"}, correlation_id="c", expiration_ms=60_000),
    )
    await (await inbox.next()).dead_letter("no reply_to")
    letter = (await dead.next()).message
    assert (letter.body, letter.correlation_id, letter.expiration_ms) == (b"x", "c", None)
    assert letter.headers["k"] == "v"
    assert letter.headers[names.HEADER_DEAD_REASON] == "no reply_to"
    assert letter.headers[names.HEADER_DEAD_QUEUE] == QUEUE
    assert letter.headers[names.HEADER_DEAD_ROUTING_KEY] == "bert"
    await consumer.close()
    assert await broker.depth(QUEUE) == 0


async def test_expired_messages_are_not_delivered(broker: Broker) -> None:
    """What expires at the head of the queue is gone."""
    await broker.publish("", QUEUE, Message(body=b"old", expiration_ms=20))
    await broker.publish("", QUEUE, Message(body=b"new", expiration_ms=60_000))
    async with asyncio.timeout(5):
        while await broker.depth(QUEUE) != 1:
            await asyncio.sleep(0.01)
    inbox = Inbox()
    await broker.consume(QUEUE, inbox, prefetch=2)
    assert (await inbox.next()).message.body == b"new"


async def test_cancel_keeps_what_is_held(broker: Broker) -> None:
    """After `cancel` nothing more comes, and what is held can still be acknowledged."""
    inbox = Inbox()
    consumer = await broker.consume(QUEUE, inbox, prefetch=2)
    assert consumer.active
    await broker.publish("", QUEUE, Message(body=b"0"))
    await broker.publish("", QUEUE, Message(body=b"1"))
    first, second = await inbox.next(), await inbox.next()
    await consumer.cancel()
    assert not consumer.active
    await broker.publish("", QUEUE, Message(body=b"2"))
    await first.ack()
    await second.requeue()
    other = Inbox()
    await consumer.close()
    await broker.consume(QUEUE, other, prefetch=5)
    assert await other.bodies(2) == [b"1", b"2"]
    assert inbox.queue.empty()


async def test_close_returns_what_is_held(broker: Broker) -> None:
    """`close` gives back what is unanswered and only that; later answers do nothing."""
    inbox, other = Inbox(), Inbox()
    consumer = await broker.consume(QUEUE, inbox, prefetch=50)
    for n in range(40):
        await broker.publish("", QUEUE, Message(body=bytes([n])))
    held = [await inbox.next() for _ in range(40)]
    for delivery in held[:-1]:
        await delivery.ack()
    await consumer.close()
    await consumer.close()
    await held[-1].ack()
    await held[-1].dead_letter("late")
    await broker.consume(QUEUE, other, prefetch=5)
    again = await other.next()
    assert (again.message.body, again.redelivered) == (bytes([39]), True)
    await again.ack()
    assert await broker.depth(QUEUE) == await broker.depth(names.DEAD) == 0


async def test_consuming_a_missing_queue(broker: Broker) -> None:
    """It is refused, and the other consumers go on."""
    inbox = Inbox()
    await broker.consume(QUEUE, inbox, prefetch=1)
    with pytest.raises(QueueMissing):
        await broker.consume("roost.model.missing.1", inbox, prefetch=1)
    with pytest.raises(ValueError):
        await broker.consume(QUEUE, inbox, prefetch=0)
    await broker.publish("", QUEUE, Message(body=b"x"))
    await (await inbox.next()).ack()


async def test_depth(broker: Broker) -> None:
    """Ready messages are counted, held ones are not; a missing queue has none."""
    assert await broker.depth("roost.model.missing.1") is None
    assert await broker.depth(QUEUE) == 0
    await broker.publish("", QUEUE, Message(body=b"x"))
    await broker.publish("", QUEUE, Message(body=b"x"))
    assert await broker.depth(QUEUE) == 2
    inbox = Inbox()
    await broker.consume(QUEUE, inbox, prefetch=1)
    await inbox.next()
    assert await broker.depth(QUEUE) == 1


async def test_delete_only_what_nobody_needs(broker: Broker) -> None:
    """A queue with messages or consumers stays; an empty, unused one goes; a missing one is
    gone already; declaring makes it anew."""
    await broker.publish("", QUEUE, Message(body=b"x"))
    assert not await broker.delete_queue(QUEUE)
    assert not await broker.delete_queue(QUEUE, if_unused=False)
    inbox = Inbox()
    consumer = await broker.consume(QUEUE, inbox, prefetch=1)
    await (await inbox.next()).ack()
    assert not await broker.delete_queue(QUEUE)
    await consumer.close()
    assert await broker.delete_queue(QUEUE)
    assert await broker.delete_queue(QUEUE)
    assert await broker.depth(QUEUE) is None
    await broker.declare_queue(QUEUE)
    await broker.declare_queue(QUEUE)
    assert await broker.depth(QUEUE) == 0


async def test_held_messages_do_not_protect_their_queue(broker: Broker) -> None:
    """What a cancelled consumer holds is lost with the queue: whoever deletes must know."""
    inbox = Inbox()
    consumer = await broker.consume(QUEUE, inbox, prefetch=1)
    await broker.publish("", QUEUE, Message(body=b"x"))
    held = await inbox.next()
    await consumer.cancel()
    assert await broker.delete_queue(QUEUE)
    await broker.declare_queue(QUEUE)
    await held.requeue()
    await consumer.close()
    assert await broker.depth(QUEUE) == 0


async def test_declaring_with_other_arguments_is_no_outage(broker: Broker) -> None:
    """A queue that exists with another expiry is taken as it is."""
    await broker.declare_queue(QUEUE, expires_s=60)
    await broker.publish("", QUEUE, Message(body=b"x"))


async def test_deleting_under_a_consumer_ends_it(broker: Broker) -> None:
    """`on_gone` is called once, and the consumer is over."""
    inbox = Inbox()
    gone = asyncio.Event()
    calls: list[None] = []

    def on_gone() -> None:
        calls.append(None)
        gone.set()

    consumer = await broker.consume(QUEUE, inbox, prefetch=1, on_gone=on_gone)
    await broker.publish("", QUEUE, Message(body=b"x"))
    held = await inbox.next()
    assert await broker.delete_queue(QUEUE, if_unused=False)
    await asyncio.wait_for(gone.wait(), 10)
    assert not consumer.active
    await held.ack()
    await consumer.cancel()
    await consumer.close()
    assert calls == [None]


async def test_lost_connection_loses_nothing(rig: Rig, broker: Broker) -> None:
    """Held messages come again to the same subscription; late answers are dropped silently."""
    inbox = Inbox()
    consumer = await broker.consume(QUEUE, inbox, prefetch=10)
    for n in range(3):
        await broker.publish("", QUEUE, Message(body=bytes([n])))
    held = [await inbox.next() for _ in range(3)]
    await rig.cut()
    again = [await inbox.next() for _ in range(3)]
    assert [each.message.body for each in again] == [b"\0", b"\1", b"\2"]
    assert all(each.redelivered for each in again)
    for delivery in held:
        await delivery.ack()
        await delivery.dead_letter("late")
    await until(lambda: consumer.active and broker.connected)
    for delivery in again:
        await delivery.ack()
    await broker.publish("", QUEUE, Message(body=b"new"))
    assert (await inbox.next()).message.body == b"new"
    assert await broker.depth(names.DEAD) == 0


async def test_deletion_and_cut_together(rig: Rig, broker: Broker) -> None:
    """A queue deleted just before the connections break is gone for its consumer; the other
    subscriptions go on."""
    kept, gone = Inbox(), asyncio.Event()
    await broker.consume(QUEUE, kept, prefetch=1)
    await broker.declare_queue("roost.model.other.1")
    await broker.consume("roost.model.other.1", Inbox(), prefetch=1, on_gone=gone.set)
    other = await rig.open("other")
    await other.delete_queue("roost.model.other.1", if_unused=False)
    await rig.cut()
    await asyncio.wait_for(gone.wait(), 10)
    await until(lambda: broker.connected)
    await broker.publish("", QUEUE, Message(body=b"x"))
    await (await kept.next()).ack()


async def test_after_close_nothing_works(broker: Broker) -> None:
    """A closed broker says so, at once."""
    inbox = Inbox()
    await broker.consume(QUEUE, inbox, prefetch=1)
    await broker.close()
    assert not broker.connected
    with pytest.raises(BrokerUnavailable):
        await broker.publish("", QUEUE, Message(body=b"x"))
    with pytest.raises(BrokerUnavailable):
        await broker.depth(QUEUE)
    await broker.close()
