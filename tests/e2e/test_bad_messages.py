"""Bad messages from AMQP producers, against a running stack: each ends as one error reply or one
dead letter, and nothing is lost, stuck or restarted. Over HTTP: test_bad_input.py."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from shared import names
from shared.broker.amqp import AmqpBroker
from shared.broker.port import Delivery, Message
from shared.names import HEADER_LENGTH
from shared.v2 import error_message
from tests.e2e.running import Up, save_doubler
from tests.e2e.steady import X, answers, body, counted, holds_nothing, of_x, seats, until
from tests.hostile import HOSTILE, RawPublisher

pytestmark = pytest.mark.usefixtures("steady")


class Producer:
    """One who publishes to RabbitMQ directly, with a reply queue and an eye on the dead."""

    def __init__(self, up: Up, broker: AmqpBroker) -> None:
        self.up = up
        self.broker = broker
        self.replies: list[Message] = []
        self.letters: list[Message] = []
        self.reply_to = f"{names.REPLY_QUEUE_PREFIX}{uuid.uuid4().hex}"
        self._answers: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        await self.broker.start()
        await self.broker.declare_queue(self.reply_to, expires_s=60)
        await self.broker.consume(self.reply_to, self._into(self.replies), prefetch=100)
        await self.broker.consume(names.DEAD, self._into(self.letters), prefetch=100)

    def _into(self, box: list[Message]) -> Callable[[Delivery], None]:
        def take(delivery: Delivery) -> None:
            box.append(delivery.message)
            task = asyncio.create_task(delivery.ack())
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)

        return take

    async def send(self, routing_key: str = "doubler", **over: Any) -> None:
        whole = {"body": body(X), "reply_to": self.reply_to, "correlation_id": "bad"}
        await self.broker.publish(names.INFER_EXCHANGE, routing_key, Message(**{**whole, **over}))

    def send_raw(self, properties: bytes, routing_key: str) -> None:
        with RawPublisher(self.up.endpoints["amqp"]) as publisher:
            publisher.publish(
                properties,
                exchange=names.INFER_EXCHANGE.encode(),
                routing_key=routing_key.encode(),
            )

    async def ends_as(self, *, letters: int = 0, errors: int = 0) -> None:
        """So many dead letters and error replies come of it, and no more until a good request
        that was sent afterwards is answered, and nobody holds anything."""
        await self.soon(lambda: len(self.letters) >= letters, "dead letters")
        await self.soon(lambda: len(self.replies) >= errors, "error replies")
        await self.send(correlation_id="good")
        good: list[Message] = []

        def is_answered() -> bool:
            good[:] = [reply for reply in self.replies if reply.correlation_id == "good"]
            return bool(good)

        await self.soon(is_answered, "the answer to a good request")
        assert good[0].headers[names.HEADER_CODE] == "ok"
        await asyncio.to_thread(until, lambda: holds_nothing(self.up), "nothing is held")
        assert (len(self.letters), len(self.replies) - 1) == (letters, errors)
        for queue in (names.DEAD, names.UNROUTED, "roost.model.doubler.1"):
            assert await self.broker.depth(queue) == 0

    async def soon(self, condition: Callable[[], object], what: str) -> None:
        try:
            async with asyncio.timeout(15):
                while not condition():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pytest.fail(f"no {what}")


@pytest.fixture
async def producer(up: Up, http: httpx.Client) -> AsyncIterator[Producer]:
    """With `doubler` bound: requests for it go to its queue, not to the placer."""
    management = up.endpoints["rabbitmq management"]
    routes = f"{management}/api/exchanges/%2F/{names.INFER_EXCHANGE}/bindings/source"

    def is_bound() -> bool:
        bindings = httpx.get(routes, trust_env=False).json()
        return any(binding["routing_key"] == "doubler" for binding in bindings)

    answers(http)
    await asyncio.to_thread(until, is_bound, "doubler is bound")
    httpx.delete(f"{management}/api/queues/%2F/{names.DEAD}/contents", trust_env=False)
    broker = AmqpBroker(up.endpoints["amqp"], "test producer")
    made = Producer(up, broker)
    await made.begin()
    yield made
    await broker.delete_queue(made.reply_to, if_unused=False)
    await broker.close()


@pytest.fixture(scope="module")
def cold(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model that is registered, and that nobody has asked."""
    up.roost("push", "cold", str(save_doubler(tmp_path_factory.mktemp("cold"))))
    yield "cold"
    up.roost("rm", "cold")


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"reply_to": None}, "no reply_to"),
        ({"reply_to": "roost.model.doubler.1"}, "reply_to is not a reply queue"),
        ({"reply_to": "somebody.elses"}, "reply_to is not a reply queue"),
        ({"reply_to": None, "routing_key": "nobody"}, "no reply_to; not_found"),
        ({"reply_to": None, "routing_key": "../etc"}, "no reply_to; invalid_argument"),
        ({"reply_to": "somebody.elses", "routing_key": "nobody"}, "not a reply queue; not_found"),
        ({"reply_to": None, "body": b"\x80garbage"}, "no reply_to"),
    ],
)
async def test_who_cannot_be_answered_leaves_one_dead_letter(producer, over, reason):
    """It says why, where it was meant to go, and still has the body."""
    sent = {"routing_key": "doubler", "body": body(X), **over}
    await producer.send(**over)
    await producer.ends_as(letters=1)
    [letter] = producer.letters
    assert reason in letter.headers[names.HEADER_DEAD_REASON]
    assert letter.headers[names.HEADER_DEAD_ROUTING_KEY] == sent["routing_key"]
    known = sent["routing_key"] == "doubler"
    queue = "roost.model.doubler.1" if known else names.UNROUTED
    assert letter.headers[names.HEADER_DEAD_QUEUE] == queue
    assert letter.body == sent["body"]


async def test_without_a_correlation_id_there_is_a_letter_and_an_error(producer):
    """The sender is told what is missing, though not of which message."""
    await producer.send(correlation_id=None)
    await producer.ends_as(letters=1, errors=1)
    assert "no correlation_id" in producer.letters[0].headers[names.HEADER_DEAD_REASON]
    assert producer.replies[0].headers[names.HEADER_CODE] == "invalid_argument"
    assert "needs a correlation_id" in (error_message(producer.replies[0].body) or "")


@pytest.mark.parametrize(
    ("over", "code", "word"),
    [
        ({"body": b"\x80garbage\0"}, "invalid_argument", "JSON"),
        ({"body": b""}, "invalid_argument", "JSON"),
        ({"body": b"[" * 100_000}, "invalid_argument", "deep"),
        ({"headers": {HEADER_LENGTH: 100_000}}, "invalid_argument", "header length"),
        ({"headers": {HEADER_LENGTH: "x"}}, "invalid_argument", "header"),
        ({"headers": {names.HEADER_DEADLINE: "soon"}}, "invalid_argument", "milliseconds"),
        ({"headers": {names.HEADER_DEADLINE: 1}}, "deadline_exceeded", "deadline"),
        ({"body": of_x(shape=[-1, 3])}, "invalid_argument", "0 or more"),
        ({"body": of_x(shape=[2**40, 2**40])}, "invalid_argument", "elements"),
        ({"body": body(X, X)}, "invalid_argument", "more than once"),
        ({"body": of_x(datatype="INT32", data=[1, 2, 3])}, "invalid_argument", "FP32"),
        ({"routing_key": "nobody"}, "not_found", "nobody"),
        ({"routing_key": "doubler/77"}, "not_found", "77"),
        ({"routing_key": "../../etc"}, "invalid_argument", "not a model name"),
        ({"routing_key": ""}, "invalid_argument", "not a model name"),
        ({"routing_key": "a" * 255}, "invalid_argument", "not a model name"),
        ({"routing_key": "doubler/0"}, "invalid_argument", "not a model version"),
        ({"routing_key": "nobody", "correlation_id": None}, "not_found", "nobody"),
    ],
)
async def test_who_can_be_answered_is_told_why(producer, over, code, word):
    """One error reply, with the code; no dead letter."""
    await producer.send(**over)
    await producer.ends_as(errors=1)
    told = producer.replies[0]
    assert told.headers[names.HEADER_CODE] == code
    assert word in (error_message(told.body) or "")


@pytest.mark.parametrize("routing_key", ["doubler", "nobody"])
async def test_a_reply_queue_that_is_gone_holds_nothing_up(producer, routing_key):
    """Nobody is left to be told: neither answer nor letter, and the next one is served."""
    await producer.send(routing_key, reply_to=f"{names.REPLY_QUEUE_PREFIX}gone")
    await producer.ends_as()


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("to", ["bound", "cold"])
async def test_hostile_properties_cost_one_message(producer, cold, case, to):
    """One dead letter from where it was found: the bound model's worker, or the placer, for
    whom it is no reason to load anything."""
    placer = producer.up.endpoints["placer"]
    before = counted(placer, "roost_placer_malformed_total")
    key = "doubler" if to == "bound" else cold
    await asyncio.to_thread(producer.send_raw, HOSTILE[case], key)
    await producer.ends_as(letters=1)
    [letter] = producer.letters
    assert letter.body == b"evil"
    assert letter.headers[names.HEADER_DEAD_REASON]
    assert letter.headers[names.HEADER_RAW_PROPERTIES]
    queue = "roost.model.doubler.1" if to == "bound" else names.UNROUTED
    assert letter.headers[names.HEADER_DEAD_QUEUE] == queue
    assert counted(placer, "roost_placer_malformed_total") - before == (to == "cold")
    assert not any(seat["model"] == f"{cold}/1" for seat in seats(producer.up))
