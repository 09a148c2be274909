"""Answers on their way outlive a crash of the broker, where their requests would have."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from roost.local.rabbit import RabbitNode
from services.worker.app import run
from services.worker.config import WorkerConfig
from shared.broker.amqp import AmqpBroker
from shared.broker.port import Delivery, Message
from shared.control import Assigned, Assignment
from shared.names import HEADER_LENGTH, model_queue
from shared.repository import Repository
from shared.store.memory import MemoryState, MemoryStore
from tests.archives import torchscript
from tests.gateway_rig import until
from tests.integration.test_drain import body_of
from tests.integration.test_worker import REPLIES, SPEC, output
from tests.unit.worker.fake_engine import FakeEngine

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]
COUNT = 20


@pytest.fixture
def rabbit(tmp_path: Path) -> Iterator[RabbitNode]:
    node = RabbitNode(tmp_path / "rabbit", management=False)
    node.start()
    yield node
    node.kill()


async def test_answers_to_persistent_requests_are_there_after_a_crash(tmp_path, rabbit):
    """The broker is killed while answers wait in a producer's durable queue. When it is back, so
    are those to persistent requests; those to transient ones were never promised more. (Requests
    may be there again as well: what it had not written of acknowledgements is forgotten.)"""
    repository = Repository(str(tmp_path / "repository"))
    digest, _ = repository.files.put([torchscript(b"echo" * 16)])
    model = repository.register("echo", 1, SPEC, digest).id
    state, stop, ready = MemoryState(), asyncio.Event(), asyncio.Event()
    config = WorkerConfig(
        worker_id="w0",
        device="cpu",
        budget_bytes="1MiB",
        repository_url=str(tmp_path / "repository"),
        data_dir=str(tmp_path / "w0"),
        amqp_url=rabbit.amqp_url,
    )
    producer = AmqpBroker(rabbit.amqp_url, "producer")
    await producer.start()
    await producer.declare_queue(REPLIES)
    await producer.declare_queue(model_queue(model))
    body, length = body_of([[1.0, 2.0]])
    for number in range(2 * COUNT):
        message = Message(
            body=body,
            headers={HEADER_LENGTH: length},
            reply_to=REPLIES,
            correlation_id=str(number),
            persistent=number < COUNT,
        )
        await producer.publish("", model_queue(model), message)
    store = MemoryStore(state)
    worker = asyncio.create_task(
        run(
            config,
            stop,
            store=MemoryStore(state),
            on_ready=lambda _: ready.set(),
            launch=FakeEngine().launch,
        )
    )
    await ready.wait()
    assigned = Assignment(worker="w0", fence=1, generation=1, models=(Assigned(model),))
    await store.put_assignment(assigned)

    async def all_are_answered() -> bool:
        return await producer.depth(REPLIES) == 2 * COUNT

    await until(all_are_answered, 60)
    # It acknowledged the requests, so the broker had confirmed the answers.
    await until(lambda: not any(m.held for m in state.reports["w0"][1].models), 60)
    stop.set()
    await worker
    await producer.close()

    await asyncio.to_thread(rabbit.kill)
    await asyncio.to_thread(rabbit.start)
    producer = AmqpBroker(rabbit.amqp_url, "producer")
    await producer.start()
    again: dict[str, Message] = {}

    def heard(delivery: Delivery) -> None:
        again[delivery.message.correlation_id or ""] = delivery.message

    await producer.consume(REPLIES, heard, prefetch=1000)
    await until(lambda: len(again) >= COUNT, 60)
    assert again.keys() == {str(number) for number in range(COUNT)}
    assert all(output(reply) == [[2.0, 4.0]] for reply in again.values())
    await producer.close()
