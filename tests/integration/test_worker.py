"""The whole agent over the twins of broker and store, with an engine that needs no torch."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import signal
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from roost.local.ports import free_ports
from services.worker.app import run
from services.worker.config import WorkerConfig
from services.worker.journal import Journal
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import Message
from shared.connect import open_broker, open_store
from shared.control import Assigned, Assignment, ModelReport, Report
from shared.models import ModelSpec, TensorSpec
from shared.names import (
    DEAD,
    HEADER_BATCH,
    HEADER_CODE,
    HEADER_DEAD_REASON,
    HEADER_DEADLINE,
    HEADER_LENGTH,
    HEADER_RETRYABLE,
    HEADER_STATUS,
    ModelId,
    model_queue,
)
from shared.repository import Repository
from shared.store.memory import MemoryState, MemoryStore
from shared.store.port import topic_assignment
from shared.tensors import from_numpy, to_numpy
from shared.v2 import InferRequest, decode_response, encode_request, error_message
from tests.unit.worker.fake_engine import FakeEngine

REPLIES = "roost.reply.test"
SPEC = ModelSpec(
    inputs=(TensorSpec("x", "FP32", (2,)),),
    outputs=(TensorSpec("y", "FP32", (2,)),),
    max_batch_size=8,
)


def archive(padding: int) -> bytes:
    """A file that looks like TorchScript from outside."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name in ("data.pkl", "constants.pkl", "code/m.py", "version"):
            zipped.writestr(f"m/{name}", b"1")
        zipped.writestr("m/data/0", bytes(padding))
    return file.getvalue()


class Stage:
    """A worker, and everything around it that a test touches."""

    def __init__(self, path: Path, budget: int, **over) -> None:
        self.exchange = MemoryExchange()
        self.state = MemoryState()
        self.store = MemoryStore(self.state)
        self.broker = MemoryBroker(self.exchange, "test")
        self.repository = Repository(str(path / "repository"))
        self.engine = FakeEngine()
        self.stop = asyncio.Event()
        self.replies: dict[str, Message] = {}
        self.may_repeat = False
        """Whether an answer may come twice."""
        self.config = WorkerConfig(
            worker_id="w0",
            device="cpu",
            budget_bytes=budget,
            repository_url=str(path / "repository"),
            data_dir=str(path),
            report_interval_s=0.05,
            **({"drain_grace_s": 5.0} | over),
        )
        self.worker_broker = MemoryBroker(self.exchange, "w0")
        self._ids = itertools.count(1)
        self._generation = 0

    def register(self, name: str, spec: ModelSpec = SPEC, padding: int = 1000) -> ModelId:
        digest, _ = self.repository.files.put([archive(padding)])
        return self.repository.register(name, 1, spec, digest).id

    async def assign(self, *models: ModelId, fence: int = 1, generation: int | None = None) -> None:
        self._generation = generation or self._generation + 1
        assigned = tuple(Assigned(model) for model in models)
        await self.store.put_assignment(
            Assignment(worker="w0", fence=fence, generation=self._generation, models=assigned)
        )
        await self.store.hint(topic_assignment("w0"))

    async def bound(self, *models: ModelId) -> None:
        """Assigns, and waits until exactly these are bound."""
        await self.assign(*models)
        await until(lambda: {m.model for m in self.models() if m.bound} == set(models))

    def report(self) -> Report:
        return self.state.reports["w0"][1]

    def models(self) -> tuple[ModelReport, ...]:
        return self.report().models if "w0" in self.state.reports else ()

    def model(self, model: ModelId) -> ModelReport:
        return next(entry for entry in self.models() if entry.model == model)

    async def send(self, model: ModelId, x: list[list[float]] | None = None, **over) -> str:
        """Publishes a request; returns its correlation id."""
        body, length = encode_request(
            InferRequest(inputs=(from_numpy("x", np.array(x, np.float32)),), binary_default=True)
            if x is not None
            else InferRequest()
        )
        headers = {HEADER_LENGTH: length} if length is not None else {}
        fields = {
            "body": body,
            "headers": headers | over.pop("headers", {}),
            "reply_to": REPLIES,
            "correlation_id": f"c{next(self._ids)}",
        }
        message = Message(**(fields | over))
        await self.broker.publish("", model_queue(model), message)
        return message.correlation_id or ""

    async def reply(self, correlation: str) -> Message:
        await until(lambda: correlation in self.replies)
        return self.replies[correlation]

    async def ask(self, model: ModelId, x: list[list[float]] | None = None, **over) -> Message:
        return await self.reply(await self.send(model, x, **over))


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.005)


def counting_publishes(broker: MemoryBroker) -> Callable[[], int]:
    """How many have been tried since."""
    publish, tried = broker.publish, 0

    async def counted(*args, **kwargs) -> None:
        nonlocal tried
        tried += 1
        await publish(*args, **kwargs)

    broker.publish = counted
    return lambda: tried


def output(reply: Message) -> list[list[float]]:
    assert reply.headers[HEADER_CODE] == "ok", reply.body
    response = decode_response(reply.body, reply.headers.get(HEADER_LENGTH))
    return to_numpy(response.outputs[0]).tolist()


@asynccontextmanager
async def working(
    path: Path, budget: int = 1 << 20, *, real: bool = False, store_is_up: bool = True, **over
) -> AsyncIterator[Stage]:
    stage = Stage(path, budget, **over)
    stage.state.reachable = store_is_up
    await stage.broker.start()
    await stage.broker.declare_queue(REPLIES)

    def on_reply(delivery) -> None:
        told_before = delivery.message.correlation_id in stage.replies
        assert stage.may_repeat or not told_before, "answered twice"
        stage.replies[delivery.message.correlation_id] = delivery.message

    await stage.broker.consume(REPLIES, on_reply, prefetch=65535)
    ready = asyncio.Event()
    task = asyncio.create_task(
        run(
            stage.config,
            stage.stop,
            broker=stage.worker_broker,
            store=MemoryStore(stage.state),
            on_ready=lambda _: ready.set(),
            launch=None if real else stage.engine.launch,
        )
    )
    stage.task = task
    stage.ready = ready
    try:
        if store_is_up:
            async with asyncio.timeout(60):
                await ready.wait()
        yield stage
    finally:
        stage.engine.gate.set()
        stage.stop.set()
        async with asyncio.timeout(10):
            await task


async def test_a_request_is_answered(tmp_path):
    """An assigned model is loaded and bound, and its answers are the model's, row by row."""
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        await stage.bound(model)
        reply = await stage.ask(model, [[1, 2], [3, 4]])
        assert output(reply) == [[2, 4], [6, 8]]
        assert reply.headers[HEADER_STATUS] == 200
        assert reply.headers[HEADER_BATCH] == 2
        await until(lambda: stage.model(model).answered == 1)
        report = stage.model(model)
        assert (report.phase, report.tier, report.held) == ("ready", "device", 0)
        assert report.seconds_per_item > 0
        assert abs(report.last_used - time.time()) < 60


async def test_requests_share_a_batch_and_get_their_own_rows(tmp_path):
    """Requests that wait together run together, up to max_batch_size rows."""
    async with working(tmp_path) as stage:
        model = stage.register("slow")
        await stage.bound(model)
        stage.engine.gate.clear()
        sent = {await stage.send(model, [[n, n]]): n for n in range(12)}
        await until(lambda: stage.model(model).held == 12)
        stage.engine.gate.set()
        for correlation, n in sent.items():
            assert output(await stage.reply(correlation)) == [[2 * n, 2 * n]]
        assert max(rows for _, rows in stage.engine.batches) > 1
        assert max(rows for _, rows in stage.engine.batches) <= 8


async def test_one_bad_item_fails_alone(tmp_path):
    """A request that makes its model raise does not take its batch along."""
    async with working(tmp_path) as stage:
        model, slow = stage.register("fail"), stage.register("slow")
        await stage.bound(model, slow)
        stage.engine.gate.clear()
        await stage.send(slow, [[0, 0]])
        good = [await stage.send(model, [[n, n]]) for n in range(3)]
        bad = await stage.send(model, [[-1, 0]])
        await until(lambda: stage.model(model).held == 4)
        stage.engine.gate.set()
        for n, correlation in enumerate(good):
            assert output(await stage.reply(correlation)) == [[2 * n, 2 * n]]
        reply = await stage.reply(bad)
        assert reply.headers[HEADER_CODE] == "model_failed"
        assert error_message(reply.body) == "x is negative"
        assert max(rows for name, rows in stage.engine.batches if name == model) > 1


async def test_out_of_memory_makes_batches_smaller(tmp_path):
    """A batch that does not fit the device is run again in halves, and all are answered."""
    async with working(tmp_path) as stage:
        model, slow = stage.register("oom"), stage.register("slow")
        await stage.bound(model, slow)
        stage.engine.gate.clear()
        await stage.send(slow, [[0, 0]])
        sent = [await stage.send(model, [[n, n]]) for n in range(8)]
        await until(lambda: stage.model(model).held == 8)
        stage.engine.gate.set()
        for n, correlation in enumerate(sent):
            assert output(await stage.reply(correlation)) == [[2 * n, 2 * n]]
        too_big = await stage.ask(model, [[0, 0]] * 6)
        assert too_big.headers[HEADER_CODE] == "resource_exhausted"
        assert too_big.headers[HEADER_RETRYABLE] is True


async def test_a_request_that_kills_engines_is_buried(tmp_path):
    """It is tried alone, and after two engines dead-lettered and told so; others are served."""
    async with working(tmp_path) as stage:
        model = stage.register("crash")
        await stage.bound(model)
        good = [await stage.send(model, [[n, n]]) for n in range(3)]
        killer = await stage.send(model, [[666, 0]])
        good += [await stage.send(model, [[n, n]]) for n in range(3, 6)]
        reply = await stage.reply(killer)
        assert reply.headers[HEADER_CODE] == "quarantined"
        for n, correlation in enumerate(good):
            assert output(await stage.reply(correlation)) == [[2 * n, 2 * n]]
        assert await stage.broker.depth(DEAD) == 1
        assert stage.report().engine_restarts in {2, 3}


@pytest.mark.parametrize(
    ("over", "code"),
    [
        ({"body": b"garbage"}, "invalid_argument"),
        ({"x": [[1, 2, 3]]}, "invalid_argument"),
        ({"x": [[1, 2]] * 9}, "invalid_argument"),
        ({"x": [[1, 2]], "headers": {HEADER_DEADLINE: "soon"}}, "invalid_argument"),
        ({"x": [[1, 2]], "headers": {HEADER_DEADLINE: 1}}, "deadline_exceeded"),
    ],
)
async def test_bad_requests_are_told_why(tmp_path, over, code):
    """A wrong or expired request never runs; whoever sent it learns the reason."""
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        await stage.bound(model)
        reply = await stage.ask(model, **over)
        assert reply.headers[HEADER_CODE] == code
        assert error_message(reply.body)
        assert not stage.engine.batches


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"reply_to": None}, "no reply_to"),
        ({"reply_to": "roost.model.other.1"}, "reply_to is not a reply queue"),
    ],
)
async def test_who_cannot_be_answered_is_dead_lettered(tmp_path, over, reason):
    """Nothing is run for a request whose answer could reach nobody."""
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        await stage.bound(model)
        letters = []
        await stage.broker.consume(DEAD, letters.append, prefetch=10)
        await stage.send(model, [[1, 2]], **over)
        await until(lambda: letters)
        assert letters[0].message.headers[HEADER_DEAD_REASON] == reason
        assert not stage.engine.batches


async def test_without_a_correlation_id_there_is_a_dead_letter_and_an_error(tmp_path):
    """Whoever sent it learns what is missing; the message is kept all the same."""
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        await stage.bound(model)
        await stage.send(model, [[1, 2]], correlation_id=None)
        reply = await stage.reply(None)
        assert reply.headers[HEADER_CODE] == "invalid_argument"
        assert "needs a correlation_id" in (error_message(reply.body) or "")
        assert await stage.broker.depth(DEAD) == 1
        assert not stage.engine.batches


async def test_a_reply_queue_that_is_gone_holds_nothing_up(tmp_path):
    """The request is acknowledged, and the next one is served."""
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        await stage.bound(model)
        await stage.send(model, [[1, 2]], reply_to="roost.reply.gone")
        assert output(await stage.ask(model, [[1, 2]])) == [[2, 4]]
        await until(lambda: stage.model(model).held == 0)


async def test_unbinding_keeps_the_weights_until_their_room_is_needed(tmp_path):
    """The least recently used of what is unbound makes room for the newcomer."""
    async with working(tmp_path, budget=6000) as stage:
        one, two, three = (stage.register(name) for name in ("one", "two", "three"))
        await stage.bound(one, two)
        await stage.ask(two, [[1, 2]])
        await stage.ask(one, [[1, 2]])
        await stage.bound()
        assert {m.tier for m in stage.models()} == {"device"}
        await stage.bound(three)
        assert stage.engine.evictions == []
        four = stage.register("four")
        await stage.bound(three, four)
        assert stage.engine.evictions == [two]
        assert stage.report().used_bytes <= 6000


async def test_a_model_without_room_is_refused_with_numbers(tmp_path):
    """The placer reads why, and the model is loaded as soon as there is room."""
    async with working(tmp_path, budget=4000) as stage:
        big, small = stage.register("big", padding=9000), stage.register("small")
        await stage.assign(big)
        await until(lambda: stage.models() and stage.model(big).phase == "failed")
        assert "larger than the whole device budget" in (stage.model(big).error or "")
        three = [stage.register(name) for name in ("a", "b", "c")]
        await stage.assign(small, *three)
        refused: list[ModelReport] = []

        def somebody_is_refused() -> bool:
            refused[:] = [m for m in stage.models() if m.phase == "failed" and m.model != big]
            return bool(refused)

        await until(somebody_is_refused)
        assert "needs" in (refused[0].error or "")
        await stage.bound(refused[0].model)


async def test_a_file_that_cannot_be_loaded_is_reported(tmp_path):
    """The error of the load stands in the report; other models are bound meanwhile."""
    async with working(tmp_path) as stage:
        broken, good = stage.register("broken"), stage.register("good")
        await stage.assign(broken, good, ModelId("unknown/1"))
        await until(lambda: sum(m.phase == "failed" for m in stage.models()) == 2)
        await until(lambda: stage.model(good).bound)
        assert stage.model(broken).error == "not a program"
        assert "not registered" in (stage.model(ModelId("unknown/1")).error or "")


async def test_a_model_that_kills_engines_as_it_loads_is_kept_from_them(tmp_path):
    """After two engines it is left alone, and the others are served by the third."""
    async with working(tmp_path) as stage:
        good, deadly = stage.register("good"), stage.register("deadly")
        await stage.assign(deadly, good)
        await until(lambda: any("quarantined" in (m.error or "") for m in stage.models()))
        await until(lambda: stage.model(good).bound)
        assert output(await stage.ask(good, [[1, 2]])) == [[2, 4]]
        assert len(stage.engine.lives) == 3


@pytest.mark.parametrize("deaths", [1, 2])
async def test_a_model_that_ended_whole_workers_is_known(tmp_path, deaths):
    """Agents that died together with their engines as they loaded it left word: after one the model
    is tried once more, after two it is kept from all engines."""
    digest, _ = Repository(str(tmp_path / "repository")).files.put([archive(1000)])
    for _ in range(deaths):
        journal = Journal(str(tmp_path))
        journal.open()
        journal.begun("echo/1", digest)
        os.close(journal._file)  # as its process is killed
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        if deaths == 1:
            await stage.bound(model)
            assert stage.repository.quarantined() == {}
            return
        await stage.assign(model)
        await until(lambda: any(m.phase == "failed" for m in stage.models()))
        assert stage.engine.loads == []
        await until(lambda: model in stage.repository.quarantined())
        told = stage.repository.quarantined()[model]
        assert told.reason == "it ended 2 workers as it was loaded"


async def test_a_model_whose_requests_kill_engines_is_quarantined(tmp_path):
    """Two of them are buried, the third is told so; the others are served."""
    async with working(tmp_path) as stage:
        good, model = stage.register("good"), stage.register("crash")
        await stage.bound(good, model)
        sent = [await stage.send(model, [[666, 0]]) for _ in range(3)]
        for correlation in sent:
            assert (await stage.reply(correlation)).headers[HEADER_CODE] == "quarantined"
        assert await stage.broker.depth(DEAD) == 2
        assert output(await stage.ask(good, [[1, 2]])) == [[2, 4]]
        lives = len(stage.engine.lives)
        await stage.bound(good)
        await stage.assign(good, model)
        await until(lambda: any("quarantined" in (m.error or "") for m in stage.models()))
        assert output(await stage.ask(good, [[1, 2]])) == [[2, 4]]
        assert len(stage.engine.lives) == lives


async def test_an_engine_that_hangs_is_ended(tmp_path):
    """In a batch as in a load; when it no longer hangs, everything is answered."""
    async with working(tmp_path, batch_timeout_s=0.2, load_timeout_s=0.2) as stage:
        model, stuck = stage.register("slow"), stage.register("stuck")
        await stage.bound(model)
        stage.engine.gate.clear()
        sent = await stage.send(model, [[1, 2]])
        await until(lambda: stage.report().engine_restarts == 1)
        stage.engine.gate.set()
        assert output(await stage.reply(sent)) == [[2, 4]]
        stage.engine.gate.clear()
        await stage.assign(model, stuck)
        await until(lambda: stage.report().engine_restarts == 2)
        stage.engine.gate.set()
        await stage.bound(model, stuck)
        assert stage.engine.lives[0].task.done()


async def test_an_engine_that_dies_is_replaced(tmp_path):
    """What was held is served by the next engine, or given back and taken again."""
    async with working(tmp_path) as stage:
        model = stage.register("slow")
        await stage.bound(model)
        stage.engine.gate.clear()
        sent = {await stage.send(model, [[n, n]]): n for n in range(6)}
        await until(lambda: stage.model(model).held == 6)
        stage.engine.life.kill()
        stage.engine.gate.set()
        for correlation, n in sent.items():
            assert output(await stage.reply(correlation)) == [[2 * n, 2 * n]]
        assert len(stage.engine.lives) == 2


async def test_the_end_is_orderly(tmp_path):
    """What runs is answered, what waits returns to its queue, the report is taken back."""
    async with working(tmp_path) as stage:
        one_by_one = ModelSpec(inputs=(TensorSpec("x", "FP32", (-1, 2)),))
        model = stage.register("slow", spec=one_by_one)
        await stage.bound(model)
        stage.engine.gate.clear()
        sent = [await stage.send(model, [[n, n]]) for n in range(4)]
        await until(lambda: stage.model(model).held == 2)
        stage.stop.set()
        await until(lambda: stage.exchange.queues[model_queue(model)].ready)
        stage.engine.gate.set()
        await asyncio.wait([stage.task])
        assert output(stage.replies[sent[0]]) == [[0, 0]]
        assert len(stage.replies) + (await stage.broker.depth(model_queue(model)) or 0) == 4
        assert "w0" not in stage.state.reports
        assert stage.engine.life.task.done()


async def test_without_the_store_the_last_word_stands(tmp_path):
    """A worker serves on while the store is away, and follows again when it is back."""
    async with working(tmp_path) as stage:
        model, other = stage.register("echo"), stage.register("other")
        await stage.bound(model)
        stage.state.reachable = False
        assert output(await stage.ask(model, [[1, 2]])) == [[2, 4]]
        stage.state.reachable = True
        await stage.bound(model, other)


async def test_an_older_placer_is_not_followed(tmp_path):
    """Neither a lower fence nor, under the same one, a lower generation changes anything."""
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        await stage.assign(model, fence=5, generation=3)
        await until(lambda: stage.models() and stage.model(model).bound)
        stage.state.assignments["w0"] = Assignment(worker="w0", fence=4, generation=9)
        await stage.store.hint(topic_assignment("w0"))
        assert output(await stage.ask(model, [[1, 2]])) == [[2, 4]]
        assert (stage.report().fence, stage.report().generation) == (5, 3)


async def test_what_was_measured_is_kept_for_the_next_worker(tmp_path):
    """The profile of the first load stands in the repository."""
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        await stage.bound(model)
        await until(lambda: stage.repository.profiles.get(model, "fake"))
        profile = stage.repository.profiles.get(model, "fake")
        assert profile is not None
        assert profile.weights_bytes == stage.model(model).footprint.weights_bytes
        assert profile.measured_at > 0


@pytest.mark.parametrize("how", ["short", "garbled", "hollow"])
async def test_outputs_that_do_not_match_the_batch_are_nobody_s(tmp_path, how):
    """A model fails that gives fewer rows than it got, or BYTES that are malformed or fewer than
    their shape says; no one gets another's row."""
    async with working(tmp_path) as stage:
        model, slow = stage.register(how), stage.register("slow")
        await stage.bound(model, slow)
        stage.engine.gate.clear()
        await stage.send(slow, [[0, 0]])
        sent = [await stage.send(model, [[n, n]]) for n in (1, 2)]
        await until(lambda: stage.model(model).held == 2)
        stage.engine.gate.set()
        for correlation in sent:
            reply = await stage.reply(correlation)
            assert reply.headers[HEADER_CODE] == "model_failed"


async def test_a_lost_broker_costs_no_request(tmp_path):
    """What is under way when the connection goes is delivered again and answered."""
    async with working(tmp_path) as stage:
        model = stage.register("slow")
        await stage.bound(model)
        stage.engine.gate.clear()
        stage.may_repeat = True
        sent = [await stage.send(model, [[n, n]]) for n in range(3)]
        await until(lambda: stage.model(model).held == 3)
        stage.worker_broker.lose()
        stage.engine.gate.set()
        await until(lambda: sum(rows for _, rows in stage.engine.batches) == 3)
        stage.worker_broker.restore()
        for n, correlation in enumerate(sent):
            assert output(await stage.reply(correlation)) == [[2 * n, 2 * n]]


async def test_an_alarm_of_the_broker_computes_nothing_twice(tmp_path):
    """Answers are kept while the broker takes none, and sent when it does again."""
    async with working(tmp_path) as stage:
        model, slow = stage.register("echo"), stage.register("slow")
        await stage.bound(model, slow)
        stage.engine.gate.clear()
        await stage.send(slow, [[0, 0]])
        sent = [await stage.send(model, [[n, n]]) for n in range(3)]
        await until(lambda: stage.model(model).held == 3)
        tries = counting_publishes(stage.worker_broker)
        stage.worker_broker.blocked = "memory"
        stage.engine.gate.set()
        await until(lambda: tries() > 12)
        assert stage.model(model).held == 3
        assert sum(rows for name, rows in stage.engine.batches if name == model) == 3
        stage.worker_broker.blocked = None
        for n, correlation in enumerate(sent):
            assert output(await stage.reply(correlation)) == [[2 * n, 2 * n]]
        assert sum(rows for name, rows in stage.engine.batches if name == model) == 3


async def test_a_worker_that_stops_under_an_alarm_gives_its_requests_back(tmp_path):
    """It does not wait out the alarm, nor its own grace: another worker may do better."""
    async with working(tmp_path, drain_grace_s=60.0) as stage:
        model = stage.register("echo")
        await stage.bound(model)
        stage.worker_broker.blocked = "disk"
        sent = [await stage.send(model, [[n, n]]) for n in range(3)]
        await until(lambda: sum(rows for _, rows in stage.engine.batches) == 3)
        stage.stop.set()
        async with asyncio.timeout(10):
            await asyncio.wait([stage.task])
        assert await stage.broker.depth(model_queue(model)) == len(sent)


async def test_a_worker_that_is_let_go_ended_as_one_that_is_stopped(tmp_path):
    """It answers what it holds, returns, and says that it was asked to: nobody restarts it."""
    async with working(tmp_path) as stage:
        model = stage.register("slow")
        await stage.bound(model)
        stage.engine.gate.clear()
        sent = await stage.send(model, [[1, 2]])
        await until(lambda: stage.model(model).held == 1)
        await stage.store.put_assignment(
            Assignment(worker="w0", fence=1, generation=2, models=(), drain=True)
        )
        await stage.store.hint(topic_assignment("w0"))
        await until(lambda: stage.report().draining)
        assert not stage.stop.is_set()
        stage.engine.gate.set()
        assert output(await stage.reply(sent)) == [[2, 4]]
        async with asyncio.timeout(20):
            await stage.task
        assert stage.stop.is_set()
        assert "w0" not in stage.state.reports


async def test_a_worker_may_start_before_the_store(tmp_path):
    """It waits for it, as it does for the broker, and then serves."""
    async with working(tmp_path, store_is_up=False) as stage:
        await until(lambda: stage.engine.lives)
        assert not stage.task.done()
        stage.state.reachable = True
        async with asyncio.timeout(10):
            await stage.ready.wait()
        model = stage.register("echo")
        await stage.bound(model)
        assert output(await stage.ask(model, [[1, 2]])) == [[2, 4]]


async def test_readiness_is_told_over_http(tmp_path):
    """Ready once a report with an engine is out; not while the broker takes nothing."""
    (port,) = free_ports(1)
    async with (
        working(tmp_path, metrics_port=port) as stage,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "ready")
        assert "roost_worker_info" in (await client.get("/metrics")).text
        stage.worker_broker.blocked = "memory"
        assert (await client.get("/readyz")).status_code == 503
        stage.worker_broker.blocked = None
        assert (await client.get("/readyz")).status_code == 200


async def test_rabbitmq_and_redis_do_as_well_as_their_twins(tmp_path, amqp_url, redis_url):
    """The same worker over the real broker and the real store, to its orderly end."""
    repository = Repository(str(tmp_path / "repository"))
    digest, _ = repository.files.put([archive(100)])
    model = repository.register("echo", 1, SPEC, digest).id
    stop, ready, engine = asyncio.Event(), asyncio.Event(), FakeEngine()
    config = WorkerConfig(
        worker_id="w0",
        device="cpu",
        budget_bytes="1MiB",
        repository_url=str(tmp_path / "repository"),
        amqp_url=amqp_url,
        redis_url=redis_url,
    )
    broker, store = open_broker(amqp_url, "test"), open_store(redis_url)
    await broker.start()
    await store.start()
    task = asyncio.create_task(
        run(config, stop, on_ready=lambda _: ready.set(), launch=engine.launch)
    )
    await ready.wait()
    assigned = Assignment(worker="w0", fence=1, generation=1, models=(Assigned(model),))
    await store.put_assignment(assigned)
    await store.hint(topic_assignment("w0"))
    while not any(m.bound for report in await store.reports() for m in report.models):
        await asyncio.sleep(0.02)
    replies: asyncio.Queue[Message] = asyncio.Queue()
    await broker.declare_queue(REPLIES, expires_s=60)
    await broker.consume(REPLIES, lambda d: replies.put_nowait(d.message), prefetch=100)
    for n in range(50):
        inputs = (from_numpy("x", np.array([[n, n]], np.float32)),)
        body, length = encode_request(InferRequest(inputs=inputs, binary_default=True))
        request = Message(
            body=body,
            headers={HEADER_LENGTH: length},
            reply_to=REPLIES,
            correlation_id=str(n),
        )
        await broker.publish("", model_queue(model), request)
    for _ in range(50):
        reply = await replies.get()
        n = int(reply.correlation_id or "-1")
        assert output(reply) == [[2 * n, 2 * n]]
    stop.set()
    await task
    assert await store.reports() == []
    assert await broker.depth(model_queue(model)) == 0
    await broker.close()
    await store.close()


@pytest.mark.torch
async def test_the_real_engine_serves_dies_and_serves_again(tmp_path):
    """The same with torch: right answers, a footprint that was measured, and kill -9."""
    torch = pytest.importorskip("torch")
    module = torch.jit.trace(torch.nn.Linear(2, 2, bias=False), torch.zeros(1, 2))
    module.save(tmp_path / "linear.pt")
    weight = next(module.parameters()).detach().numpy()
    async with working(tmp_path, 1 << 28, real=True) as stage:
        digest, _ = stage.repository.files.put([(tmp_path / "linear.pt").read_bytes()])
        model = stage.repository.register("linear", 1, SPEC, digest).id
        await stage.bound(model)
        assert stage.model(model).footprint.measured
        before = stage.report().engine_restarts
        for _ in range(2):
            sent = [await stage.send(model, [[n, 1], [0, n]]) for n in range(20)]
            for n, correlation in enumerate(sent):
                expected = np.array([[n, 1], [0, n]], np.float32) @ weight.T
                assert np.allclose(output(await stage.reply(correlation)), expected, atol=1e-5)
            if stage.report().engine_restarts == before:
                os.kill(_engine_pid(), signal.SIGKILL)
                await until(lambda: stage.report().engine_restarts == before + 1)
                await until(lambda: any(m.bound for m in stage.models()), timeout_s=60)


def _engine_pid() -> int:
    (engine,) = [
        child
        for child in psutil.Process().children()
        if "services.worker.engine" in child.cmdline()
    ]
    return int(engine.pid)
