"""Subscriptions: single requests and packs into facts, and the prefetch that follows them."""

from __future__ import annotations

import asyncio

from services.worker.consume import Consumers
from services.worker.core.events import ConsumerStarted, Fact, ItemArrived, StartConsumer
from services.worker.items import Items
from services.worker.metrics import Metrics
from shared import packs
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import Message
from shared.models import ModelSpec, TensorSpec
from shared.names import HEADER_DEADLINE, ModelId, model_queue
from tests.gateway_rig import until

MODEL = ModelId("m/1")
QUEUE = model_queue(MODEL)
SPEC = ModelSpec(inputs=(TensorSpec("x", "FP32", (1,)),), max_batch_size=32)
BODY = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}]}'


class Eager(MemoryBroker):
    """Delivers before it says that the consumer is there, as RabbitMQ may."""

    async def consume(self, *args, **kwargs):
        made = await super().consume(*args, **kwargs)
        await asyncio.sleep(0)
        return made


class Rig:
    """Consumers of a broker in memory, and the facts that they told."""

    def __init__(self) -> None:
        self.broker = Eager(MemoryExchange(), "worker")
        self.facts: list[Fact] = []
        self.items = Items()
        self.consumers = Consumers(
            self.broker, self.items, lambda _: SPEC, self.facts.append, Metrics("w")
        )

    async def start(self, prefetch: int = 64) -> None:
        await self.broker.start()
        self.consumers.start(StartConsumer(1, MODEL, prefetch))
        await until(lambda: ConsumerStarted(1) in self.facts)

    @property
    def arrived(self) -> list[ItemArrived]:
        return [fact for fact in self.facts if isinstance(fact, ItemArrived)]

    async def send(self, *messages: Message) -> None:
        await self.broker.publish("", QUEUE, packs.pack(messages))

    def window(self) -> int:
        (consumer,) = self.broker.consumers
        return consumer._prefetch


def request(number: int, **fields) -> Message:
    whole = {"body": BODY, "correlation_id": str(number), "reply_to": "roost.reply.t"}
    return Message(**(whole | fields))


async def test_each_member_of_a_pack_is_a_request_of_its_own():
    """A wrong or late one is refused, and the others run."""
    rig = Rig()
    await rig.start()
    await rig.send(
        request(1), request(2, body=b"{"), request(3, headers={HEADER_DEADLINE: 1000}), request(4)
    )
    await until(lambda: len(rig.arrived) == 4)
    codes = [fact.fault and fact.fault.code for fact in rig.arrived]
    assert codes == [None, "invalid_argument", "deadline_exceeded", None]
    assert [fact.unanswerable for fact in rig.arrived] == [None] * 4
    ids = rig.items.request_ids(fact.item.item for fact in rig.arrived)
    assert ids == ["1", "2", "3", "4"]
    await rig.consumers.close_all()


async def test_what_only_calls_itself_a_pack_is_one_message_to_bury():
    """And says why."""
    rig = Rig()
    await rig.start()
    await rig.send(Message(body=b"no", content_type=packs.CONTENT_TYPE, reply_to="roost.reply.t"))
    await until(lambda: bool(rig.arrived))
    (fact,) = rig.arrived
    assert fact.unanswerable is not None
    assert "pack" in fact.unanswerable
    await rig.consumers.close_all()


async def test_the_prefetch_follows_what_messages_hold():
    """Two packs of 32 are as much as 64 single requests."""
    rig = Rig()
    await rig.start()
    assert rig.window() == 8
    await rig.send(*(request(number) for number in range(32)))
    await until(lambda: rig.window() == 2)
    known = rig.consumers.window(MODEL)
    assert known is not None
    assert (known.mean, known.full(32)) == (32.0, False)
    await rig.send(*(request(number) for number in range(32)))
    await until(lambda: known.full(64))
    await rig.consumers.close_all()


async def test_single_requests_have_the_whole_window():
    """As soon as one came."""
    rig = Rig()
    await rig.start()
    await rig.send(request(1))
    await until(lambda: rig.window() == 64)
    await rig.consumers.close_all()


async def test_what_comes_before_the_subscription_is_confirmed_counts():
    """It waited in the queue, and is often the first of a burst."""
    rig = Rig()
    await rig.broker.start()
    await rig.broker.declare_queue(QUEUE)
    await rig.send(request(1))
    await rig.start()
    await until(lambda: len(rig.arrived) == 1)
    await until(lambda: rig.window() == 64)
    await rig.consumers.close_all()
