"""Answers, while the broker takes none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import structlog.testing

from services.worker.core.events import Fault, Item
from services.worker.items import Held
from services.worker.metrics import Metrics
from services.worker.reply import Replier
from shared import packs
from shared.broker.port import BrokerUnavailable, Message, PublishUncertain
from shared.errors import RoostError
from shared.names import HEADER_CODE, HEADER_PACKS, ModelId
from shared.v2 import InferRequest

FAULT = Fault("model_failed", "no")
ASKED = Message(body=b"", reply_to="roost.reply.t", correlation_id="r1")


class Broker:
    """Fails as told, then takes everything."""

    def __init__(self, *failures: RoostError, always: RoostError | None = None) -> None:
        self.failures = list(failures)
        self.always = always
        self.tries = 0
        self.tried = asyncio.Event()
        self.sent: list[Message] = []

    async def publish(self, exchange: str, key: str, message: Message, **_) -> None:
        self.tries += 1
        self.tried.set()
        if self.always or self.failures:
            raise self.always or self.failures.pop(0)
        self.sent.append(message)


class Delivery:
    """Notes its end."""

    def __init__(self, fails: Callable[[], RoostError | None] = lambda: None) -> None:
        self.message = ASKED
        self.ends: list[str] = []
        self._fails = fails

    async def ack(self) -> None:
        self.ends.append("acked")

    async def requeue(self) -> None:
        self.ends.append("requeued")

    async def dead_letter(self, reason: str) -> None:
        if (failure := self._fails()) is not None:
            raise failure
        self.ends.append("buried")


def held(delivery: Delivery, deadline: float | None = None) -> Held:
    item = Item(item=1, model=ModelId("m/1"), subscription=1, deadline=deadline)
    return Held(item, delivery, InferRequest())


def replier(broker: Broker, **over) -> Replier:
    return Replier(broker, lambda _: None, Metrics("w"), timeout_s=1.0, **over)


@pytest.mark.parametrize("failure", [BrokerUnavailable("alarm"), PublishUncertain("silence")])
async def test_an_answer_is_kept_until_the_broker_takes_it(failure):
    """And the request is acknowledged then, never given back."""
    broker, delivery = Broker(failure, failure, failure), Delivery()
    sender = replier(broker)
    sender.refuse(held(delivery), FAULT)
    await sender.drained()
    assert (broker.tries, len(broker.sent), delivery.ends) == (4, 1, ["acked"])


@pytest.mark.parametrize("after_s", [0.1, -5.0, None])
async def test_it_is_given_back_when_nobody_waits_any_longer(after_s):
    """At the deadline; without one, or when that has passed before, after a while, since what is
    given back comes again at once. The log names the request."""
    deadline = None if after_s is None else time.monotonic() + after_s
    broker, delivery = Broker(always=BrokerUnavailable("alarm")), Delivery()
    sender = replier(broker, patience_s=0.1)
    began = time.monotonic()
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        sender.refuse(held(delivery, deadline), FAULT)
        await sender.drained()
    assert time.monotonic() - began >= 0.05  # the deadline began a little before
    assert delivery.ends == ["requeued"]
    assert 1 < broker.tries < 100
    assert [line["event"] for line in logs] == ["replies_wait", "reply_failed"]
    assert (logs[-1]["model"], logs[-1]["request_id"]) == ("m/1", "r1")


async def test_it_is_given_back_when_the_worker_stops():
    """At once, whatever remains of its time."""
    broker, delivery = Broker(always=BrokerUnavailable("alarm")), Delivery()
    sender = replier(broker, patience_s=3600.0)
    sender.refuse(held(delivery), FAULT)
    await broker.tried.wait()
    sender.hurry()
    async with asyncio.timeout(5):
        await sender.drained()
    assert delivery.ends == ["requeued"]


async def test_a_burial_waits_for_the_broker_as_well():
    """The dead letter comes first, then the asker is told."""
    failures = [BrokerUnavailable("alarm")] * 2
    broker = Broker(BrokerUnavailable("alarm"))
    delivery = Delivery(lambda: failures.pop() if failures else None)
    sender = replier(broker)
    sender.bury(held(delivery), "it kills engines", FAULT)
    await sender.drained()
    assert (delivery.ends, len(broker.sent), failures) == (["buried"], 1, [])


def packing(number: int, **headers) -> Delivery:
    """Of somebody who reads packs of replies."""
    delivery = Delivery()
    delivery.message = Message(
        body=b"",
        reply_to="roost.reply.t",
        correlation_id=str(number),
        headers={HEADER_PACKS: True, **headers},
    )
    return delivery


async def test_answers_of_one_turn_travel_together():
    """To whoever said that it reads packs, and each request is acknowledged; to others one by
    one."""
    broker = Broker()
    sender = replier(broker)
    deliveries = [packing(number) for number in range(3)]
    single = Delivery()
    for delivery in (*deliveries, single):
        sender.refuse(held(delivery), FAULT)
    await sender.drained()
    packed, alone = broker.sent
    assert [reply.correlation_id for reply in packs.members(packed)] == ["0", "1", "2"]
    assert all(reply.headers[HEADER_CODE] == "model_failed" for reply in packs.members(packed))
    assert (packs.is_pack(alone), alone.correlation_id) == (False, "r1")
    assert [each.ends for each in (*deliveries, single)] == [["acked"]] * 4
    sender.refuse(held(packing(4)), FAULT)
    await sender.drained()
    assert (packs.is_pack(broker.sent[2]), broker.sent[2].correlation_id) == (False, "4")


async def test_a_pack_of_answers_is_kept_as_long_as_its_last_deadline():
    """And then all of its requests are given back."""
    broker = Broker(always=BrokerUnavailable("alarm"))
    sender = replier(broker, patience_s=0.01)
    deliveries = [packing(number) for number in range(2)]
    began = time.monotonic()
    for delivery, after_s in zip(deliveries, (0.05, 0.3), strict=True):
        sender.refuse(held(delivery, began + after_s), FAULT)
    await sender.drained()
    assert time.monotonic() - began >= 0.29
    assert [each.ends for each in deliveries] == [["requeued"]] * 2


async def test_large_answers_are_not_packed_beyond_the_limit():
    """They go in as many messages as it takes."""
    broker = Broker()
    sender = replier(broker)
    fault = Fault("model_failed", "x" * (packs.MAX_BYTES // 2 - 100))
    for number in range(3):
        sender.refuse(held(packing(number)), fault)
    await sender.drained()
    assert [packs.count(message) for message in broker.sent] == [2, 1]
