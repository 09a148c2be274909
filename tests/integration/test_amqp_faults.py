"""RabbitMQ hurt in earnest: killed, suspended, out of memory, cut off. A node of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from roost.local.rabbit import RabbitNode
from shared import names
from shared.broker import frames
from shared.broker.amqp import AmqpBroker
from shared.broker.port import (
    BrokerUnavailable,
    Delivery,
    Message,
    PublishUncertain,
    QueueMissing,
)
from shared.broker.session import Link, Session, asked
from shared.errors import RoostError, Unavailable

pytestmark = [pytest.mark.services, pytest.mark.timeout(180)]
QUEUE = "roost.model.bert.1"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitNode]:
    """A broker that these tests may hurt."""
    own = RabbitNode(tmp_path_factory.mktemp("hurt"), management=False)
    own.start()
    yield own
    own.kill()


@pytest.fixture
async def broker(node: RabbitNode) -> AsyncIterator[AmqpBroker]:
    """A started broker with one empty queue."""
    opened = AmqpBroker(node.amqp_url, "test")
    await opened.start()
    with suppress(RoostError):
        await empty(opened, QUEUE)
    await opened.declare_queue(QUEUE)
    yield opened
    await opened.close()


async def empty(broker: AmqpBroker, queue: str) -> None:
    async with broker._consuming.now().admin() as channel:
        await channel.queue_delete(queue)


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def publish_until_accepted(broker: AmqpBroker, message: Message) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                return await broker.publish("", QUEUE, message)
            except Unavailable:
                await asyncio.sleep(0.02)


class Inbox(asyncio.Queue[Delivery]):
    async def next(self, timeout_s: float = 30.0) -> Delivery:
        return await asyncio.wait_for(self.get(), timeout_s)


class Proxy:
    """Stands between clients and the broker; can cut, refuse and hold back."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.writers: set[asyncio.StreamWriter] = set()
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.refusing = False

    async def start(self) -> None:
        self.server = await asyncio.start_server(self.accept, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers |= {writer, back}
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self.copy(source, sink))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self.flowing.wait()
                sink.write(data)
                await sink.drain()
        sink.transport.abort()

    def cut(self) -> None:
        """Resets every connection."""
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    async def close(self) -> None:
        self.flowing.set()
        self.server.close()
        self.cut()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.server.wait_closed()


@pytest.fixture
async def proxy(node: RabbitNode) -> AsyncIterator[Proxy]:
    between = Proxy(node.port)
    await between.start()
    yield between
    await between.close()


def through(proxy: Proxy) -> str:
    return f"amqp://guest:guest@127.0.0.1:{proxy.port}/"


async def test_killed_broker_loses_nothing_that_it_confirmed(
    node: RabbitNode, broker: AmqpBroker
) -> None:
    """After kill -9 and a restart every confirmed persistent message is delivered again, held
    or not, to the subscriptions that were there before; answers from before are dropped."""
    inbox = Inbox()
    consumer = await broker.consume(QUEUE, inbox.put_nowait, prefetch=5)
    sent = {bytes([n]) for n in range(20)}
    await asyncio.gather(*(broker.publish("", QUEUE, Message(body=each)) for each in sent))
    held = [await inbox.next() for _ in range(5)]
    await asyncio.to_thread(node.kill)
    await until(lambda: not broker.connected)
    with pytest.raises(BrokerUnavailable):
        await broker.publish("", QUEUE, Message(body=b"no"))
    with pytest.raises(BrokerUnavailable):
        await broker.declare_queue(QUEUE)
    for delivery in held:
        await delivery.ack()
    await asyncio.to_thread(node.start)
    got = set()
    while len(got) < len(sent):
        delivery = await inbox.next()
        got.add(delivery.message.body)
        await delivery.ack()
    assert got == sent
    assert consumer.active
    await until(lambda: broker.connected)
    await broker.publish(names.INFER_EXCHANGE, "nobody", Message(body=b"x"))
    assert await broker.depth(QUEUE) == 0


async def test_publishes_under_way_when_the_broker_dies(
    node: RabbitNode, broker: AmqpBroker
) -> None:
    """Each ends with an error of ours, promptly: no hanging, no CancelledError. What was
    confirmed is in the queue after the restart."""
    confirmed = 0
    failures: list[BaseException] = []
    stop = asyncio.Event()

    async def publish() -> None:
        nonlocal confirmed
        while not stop.is_set():
            try:
                await broker.publish("", QUEUE, Message(body=b"x"))
                confirmed += 1
            except (PublishUncertain, BrokerUnavailable) as error:
                failures.append(error)
                return

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for _ in range(50):
            group.create_task(publish())
        await until(lambda: confirmed > 100)
        await asyncio.to_thread(node.kill)
    assert len(failures) == 50
    assert any(isinstance(each, PublishUncertain) for each in failures)
    await asyncio.to_thread(node.start)
    await until(lambda: broker.connected)
    depth = await retried(lambda: broker.depth(QUEUE))
    assert depth is not None
    assert confirmed <= depth <= confirmed + 50


async def retried(call: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.timeout(30):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.02)


async def test_forced_close_resumes_within_two_seconds(
    node: RabbitNode, broker: AmqpBroker
) -> None:
    """When an operator closes all connections, 300 consumers are all there again soon."""
    inbox = Inbox()
    queues = [f"roost.model.m{n}.1" for n in range(300)]
    for queue in queues:
        await broker.declare_queue(queue)
    consumers = [await broker.consume(queue, inbox.put_nowait, prefetch=2) for queue in queues]
    assert all(consumer.active for consumer in consumers)
    closed = asyncio.create_task(
        asyncio.to_thread(node.ctl, "close_all_connections", "--vhost", "/", "test")
    )
    await until(lambda: not any(consumer.active for consumer in consumers))
    started = time.monotonic()
    await until(lambda: all(consumer.active for consumer in consumers))
    assert time.monotonic() - started < 4.0  # 2 s on a machine that is not busy otherwise
    await closed
    for queue in queues:
        await retried(lambda queue=queue: broker.publish("", queue, Message(body=b"x")))
    for _ in queues:
        await (await inbox.next()).ack()
    for consumer in consumers:
        await consumer.close()
        assert await broker.delete_queue(consumer.queue)


async def test_alarm_stops_publishes_and_nothing_else(node: RabbitNode, broker: AmqpBroker) -> None:
    """Under the memory alarm publishes fail at once, consuming and declaring go on; when it
    ends, so do the failures."""
    inbox = Inbox()
    await broker.publish("", QUEUE, Message(body=b"before"))
    await asyncio.to_thread(node.ctl, "set_vm_memory_high_watermark", "absolute", "1MB")
    try:
        # The broker says so to a connection only when that one publishes.
        with pytest.raises((PublishUncertain, BrokerUnavailable)):  # noqa: PT012 - until it is told
            async with asyncio.timeout(20):
                while True:
                    await broker.publish("", QUEUE, Message(body=b"during"), timeout_s=1.0)
        await until(lambda: not broker.connected)
        started = time.monotonic()
        with pytest.raises(BrokerUnavailable, match="memory"):
            await broker.publish("", QUEUE, Message(body=b"refused"))
        assert time.monotonic() - started < 0.1
        await broker.consume(QUEUE, inbox.put_nowait, prefetch=1)
        first = await inbox.next()
        assert first.message.body == b"before"
        await first.ack()
        await broker.declare_queue("roost.model.other.1")
        assert await broker.delete_queue("roost.model.other.1")
    finally:
        await asyncio.to_thread(node.ctl, "set_vm_memory_high_watermark", "absolute", "1GB")
    await until(lambda: broker.connected)
    await publish_until_accepted(broker, Message(body=b"after"))
    while True:
        delivery = await inbox.next()
        await delivery.ack()
        assert delivery.message.body in {b"during", b"after"}  # uncertain is not lost
        if delivery.message.body == b"after":
            break


async def test_failed_dead_letter_keeps_the_message(node: RabbitNode, proxy: Proxy) -> None:
    """When the dead letter cannot be published, the message is still held and can be tried
    again: it is never acknowledged before it is safe."""
    broker = AmqpBroker(through(proxy), "test")
    await broker.start()
    await empty(broker, QUEUE)
    await broker.declare_queue(QUEUE)
    await empty(broker, names.DEAD)
    inbox = Inbox()
    await broker.consume(QUEUE, inbox.put_nowait, prefetch=1)
    await broker.publish("", QUEUE, Message(body=b"x"))
    held = await inbox.next()
    with pytest.raises(RoostError):
        await held.dead_letter("there is no queue for the dead")
    proxy.cut()
    again = await inbox.next()
    assert again.redelivered
    await until(lambda: broker.connected)
    await again.dead_letter("there is one again")
    assert await broker.depth(names.DEAD) == 1
    await empty(broker, names.DEAD)
    await broker.close()


async def test_suspended_broker_leaves_publishes_uncertain(
    node: RabbitNode, broker: AmqpBroker
) -> None:
    """A broker that does not answer costs the time-out, no more; then it goes on."""
    await asyncio.to_thread(node.pause)
    try:
        started = time.monotonic()
        with pytest.raises(PublishUncertain):
            await broker.publish("", QUEUE, Message(body=b"x"), timeout_s=0.3)
        assert time.monotonic() - started < 1.0
        task = asyncio.create_task(broker.publish("", QUEUE, Message(body=b"y")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        node.resume()
    await publish_until_accepted(broker, Message(body=b"z"))
    assert await broker.depth(QUEUE) == 3


async def test_late_return_harms_nobody(node: RabbitNode, broker: AmqpBroker) -> None:
    """A message returned after its publisher gave up does not close the channel."""
    session = broker._publishing.session
    await asyncio.to_thread(node.pause)
    try:
        outcomes = await asyncio.gather(
            *(
                broker.publish("", "roost.reply.gone", Message(body=b"x"), timeout_s=0.1)
                for _ in range(8)
            ),
            return_exceptions=True,
        )
        assert all(isinstance(each, PublishUncertain) for each in outcomes)
    finally:
        node.resume()
    for _ in range(8):
        await broker.publish("", QUEUE, Message(body=b"x"))
    assert broker._publishing.session is session
    assert broker._publisher is not None
    await until(lambda: not any(each.pending for each in broker._publisher._channels))


async def test_refused_publish_costs_one_channel(broker: AmqpBroker) -> None:
    """Publishing to an exchange that is not there closes one channel, which is replaced."""
    session = broker._publishing.session
    for _ in range(8):
        with pytest.raises(Unavailable):
            await broker.publish("no.such.exchange", "k", Message(body=b"x"))
        await broker.publish("", QUEUE, Message(body=b"x"))
    assert broker._publisher is not None
    await until(lambda: len(broker._publisher._channels) == 4)
    assert broker._publishing.session is session
    assert await broker.depth(QUEUE) == 8


async def test_cut_connections_come_back(node: RabbitNode, proxy: Proxy) -> None:
    """Connections reset on the wire, several times, with traffic in both directions: every
    message that was accepted is received at least once."""
    broker = AmqpBroker(through(proxy), "test")
    await broker.start()
    await empty(broker, QUEUE)
    await broker.declare_queue(QUEUE)
    received: set[bytes] = set()
    inbox = Inbox()
    await broker.consume(QUEUE, inbox.put_nowait, prefetch=20)

    async def answer() -> None:
        while True:
            delivery = await inbox.get()
            received.add(delivery.message.body)
            await delivery.ack()

    async with asyncio.TaskGroup() as group:
        answering = group.create_task(answer())
        accepted = []
        for n in range(400):
            body = n.to_bytes(2, "big")
            await publish_until_accepted(broker, Message(body=body))
            accepted.append(body)
            if n % 100 == 50:
                proxy.cut()
        await until(lambda: set(accepted) <= received)
        answering.cancel()
    await broker.close()


async def test_queue_deleted_while_disconnected(node: RabbitNode, proxy: Proxy) -> None:
    """After the reconnect the subscription to a queue that is gone ends, with `on_gone`; it is
    not made anew. The others go on."""
    far, near = AmqpBroker(through(proxy), "far"), AmqpBroker(node.amqp_url, "near")
    await far.start()
    await near.start()
    await near.declare_queue(QUEUE)
    await near.declare_queue("roost.model.other.1")
    gone, inbox = asyncio.Event(), Inbox()
    consumer = await far.consume(QUEUE, inbox.put_nowait, prefetch=1, on_gone=gone.set)
    other = await far.consume("roost.model.other.1", inbox.put_nowait, prefetch=1)
    proxy.refusing = True
    proxy.cut()
    await until(lambda: not consumer.active)
    await empty(near, QUEUE)
    proxy.refusing = False
    await asyncio.wait_for(gone.wait(), 30)
    assert await near.depth(QUEUE) is None
    await until(lambda: other.active)
    await near.publish("", "roost.model.other.1", Message(body=b"x"))
    await (await inbox.next()).ack()
    with pytest.raises(QueueMissing):
        await near.consume(QUEUE, inbox.put_nowait, prefetch=1)
    await far.close()
    await near.delete_queue("roost.model.other.1")
    await near.close()


async def test_start_waits_for_the_broker(proxy: Proxy) -> None:
    """A service may be started before its broker; closing it while it waits is no hang."""
    proxy.refusing = True
    broker, other = AmqpBroker(through(proxy), "early"), AmqpBroker(through(proxy), "never")
    starting = asyncio.create_task(broker.start())
    other_starting = asyncio.create_task(other.start())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(starting), 0.5)
    other_starting.cancel()
    await other.close()
    proxy.refusing = False
    await asyncio.wait_for(starting, 20)
    assert broker.connected
    await broker.close()


async def test_start_fails_when_the_frame_hook_does_not_hold(
    node: RabbitNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An aiormq that does not use our frame receiver is found out at the first connection."""
    monkeypatch.setattr(frames, "install", lambda: None)
    monkeypatch.setattr("aiormq.connection.FrameReceiver", frames.TolerantFrameReceiver.__base__)
    broker = AmqpBroker(node.amqp_url, "test")
    with pytest.raises(RuntimeError, match="frames"):
        await asyncio.wait_for(broker.start(), 20)
    await broker.close()


async def test_a_handshake_that_ends_early_is_no_connection_yet() -> None:
    """aiormq says `StopAsyncIteration` when the broker hangs up at a certain moment of the
    handshake (as one that is just ending or starting does): it is tried again, not given up."""

    async def handshake() -> None:
        raise StopAsyncIteration

    with pytest.raises(BrokerUnavailable):
        await asked(handshake())


async def test_a_connection_that_has_been_up_is_never_given_up(proxy: Proxy) -> None:
    """Whatever goes wrong when it comes again: else a service would live on without it."""
    prepared = 0

    async def prepare(_: Session) -> None:
        nonlocal prepared
        prepared += 1
        if prepared == 2:
            raise ValueError("a fault of ours")

    link = Link(through(proxy), "test", prepare)
    link.start()
    first = await asyncio.wait_for(link.up(), 30)
    proxy.cut()
    await asyncio.wait_for(first.lost.wait(), 30)
    await until(lambda: prepared == 3 and link.session is not None)
    await link.close()


async def test_a_half_open_connection_is_noticed_by_its_silence(proxy: Proxy) -> None:
    """No end and no reset come through it; after three heartbeats it is lost, and made anew."""

    async def prepare(_: Session) -> None:
        """Nothing is needed on it."""

    link = Link(f"{through(proxy)}?heartbeat=1", "test", prepare)
    link.start()
    first = await asyncio.wait_for(link.up(), 30)
    proxy.flowing.clear()
    await asyncio.wait_for(first.lost.wait(), 30)
    proxy.flowing.set()
    await until(lambda: link.session is not None and link.session is not first)
    await link.close()
