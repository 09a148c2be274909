"""The agent's half of the handover, with an engine that needs no torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest

from services.worker import wire
from services.worker.core.events import EngineLost, Fact, RunBatch
from services.worker.runtime import Runtime
from shared.models import Manifest, ModelSpec, Padding, TensorSpec
from shared.names import ModelId, split_model_id
from shared.supervise import Backoff
from shared.tensors import from_numpy, to_numpy
from shared.v2 import InferRequest
from tests.unit.worker.fake_engine import FakeEngine

DEADLINE_S = 10.0
INBOX_BYTES = 4096
OUTBOX_BYTES = 1 << 16


class Rig:
    """A runtime and what it told."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.facts: list[Fact] = []
        self.starts: list[wire.EngineStarted] = []
        self._changed = asyncio.Event()
        self.runtime = Runtime(
            self.engine.launch,
            self._tell,
            self._started,
            inbox_bytes=INBOX_BYTES,
            outbox_bytes=OUTBOX_BYTES,
            backoff=Backoff(0.0, 0.0),
        )

    def _tell(self, fact: Fact) -> None:
        self.facts.append(fact)
        self._changed.set()

    def _started(self, started: wire.EngineStarted, _pid: int) -> None:
        self.starts.append(started)
        self._changed.set()

    async def until(self, condition) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def next(self) -> Fact:
        await self.until(lambda: self.facts)
        return self.facts.pop(0)

    async def load(self, model: str, **more) -> wire.ModelLoaded:
        name, version = split_model_id(ModelId(model))
        manifest = Manifest(name=name, version=version, digest="", size_bytes=100, created_at=0.0)
        self.runtime.load(ModelId(model), (), manifest, **more)
        fact = await self.next()
        assert isinstance(fact, wire.ModelLoaded), fact
        return fact

    def run(self, batch: int, model: str, *x: list[float], spec=None, size=0) -> None:
        requests = [InferRequest(inputs=(from_numpy("x", np.array([v], np.float32)),)) for v in x]
        order = RunBatch(batch, ModelId(model), tuple(range(len(x))), len(x), size)
        self.runtime.run_batch(order, requests, spec or ModelSpec())

    def y(self, batch: int) -> list[list[float]]:
        (output,) = self.runtime.outputs(batch)
        return to_numpy(output).tolist()


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Rig]:
    rig = Rig()
    task = asyncio.create_task(rig.runtime.run())
    await rig.until(lambda: rig.starts or task.done())
    try:
        yield rig
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def rig():
    async with running() as rig:
        yield rig


async def test_a_batch_goes_over_and_its_outputs_come_back(rig):
    """The rows of several requests, one after the other."""
    await rig.load("m/1")
    rig.run(1, "m/1", [1, 2], [3, 4])
    assert isinstance(await rig.next(), wire.BatchRan)
    assert rig.y(1) == [[2, 4], [6, 8]]
    assert rig.engine.batches == [("m/1", 2)]


async def test_requests_are_padded_on_their_way(rig):
    """To the size that the core chose."""
    await rig.load("m/1")
    spec = ModelSpec(
        inputs=(TensorSpec("x", "FP32", (-1,)),),
        max_batch_size=8,
        padding=Padding(inputs={"x": 0}, sizes=(4,)),
    )
    rig.run(1, "m/1", [1, 2], [3], spec=spec, size=4)
    await rig.next()
    assert rig.y(1) == [[2, 4, 0, 0], [6, 0, 0, 0]]


async def test_batches_wait_for_room_in_the_inbox_in_order(rig):
    """And run as it becomes free."""
    await rig.load("slow/1")
    rig.engine.gate.clear()
    wide = [1.0] * (INBOX_BYTES // 4 - 16)
    for batch in (1, 2):
        rig.run(batch, "slow/1", wide)
    rig.run(3, "slow/1", [1.0])
    rig.engine.gate.set()
    for batch in (1, 2, 3):
        fact = await rig.next()
        assert isinstance(fact, wire.BatchRan)
        assert fact.batch == batch
        rig.runtime.release()


async def test_what_can_never_fit_the_inbox_fails_at_once(rig):
    """With both sizes, and without the engine."""
    rig.run(1, "m/1", [1.0] * INBOX_BYTES)
    failed = await rig.next()
    assert isinstance(failed, wire.BatchFailed)
    assert failed.code == "too_large"
    assert "16,384 bytes, the inbox 4,096" in failed.message


async def test_outputs_are_given_back_with_the_next_batch(rig):
    """An idle engine is not woken for it; one that has something to do hears of it soon, since
    it may be waiting for the room."""
    await rig.load("slow/1")
    rig.run(1, "slow/1", [1])
    await rig.next()
    rig.runtime.release()
    rig.run(2, "slow/1", [1])
    await rig.next()
    assert rig.engine.life.released == [1]
    rig.engine.gate.clear()
    rig.run(3, "slow/1", [1])
    rig.runtime.release()
    rig.engine.gate.set()
    await rig.next()
    rig.runtime.release()
    rig.run(4, "slow/1", [1])
    await rig.next()
    assert rig.engine.life.released == [1, 2, 3]


async def test_tiers_travel_with_loads_and_evictions(rig):
    """A model may be held in the host's memory alone, and leaves each tier by its name."""
    assert (await rig.load("m/1", tier="host")).tier == "host"
    loaded = await rig.load("m/1", keep_host=True)
    assert (loaded.tier, loaded.source) == ("device", "host")
    rig.runtime.evict(ModelId("m/1"))
    assert await rig.next() == wire.ModelEvicted(ModelId("m/1"), "device")
    rig.runtime.evict(ModelId("m/1"), "host")
    assert await rig.next() == wire.ModelEvicted(ModelId("m/1"), "host")


async def test_the_engine_s_word_on_its_memory_is_kept(rig):
    """The last one; none of a dead engine's."""
    assert rig.runtime.memory is None
    await rig.load("m/1")
    assert rig.runtime.memory == wire.MemoryMeasured(100)
    rig.runtime.kill("for the test")
    await rig.next()
    assert rig.runtime.memory is None


async def test_a_killed_engine_is_lost_for_the_reason_given(rig):
    """And the next one is started."""
    rig.runtime.kill("it hangs")
    assert await rig.next() == EngineLost("it hangs")
    await rig.until(lambda: len(rig.starts) == 2)


async def test_outputs_outlive_the_engine_that_made_them(rig):
    """They lie in memory of ours."""
    await rig.load("m/1")
    rig.run(1, "m/1", [1])
    await rig.next()
    rig.runtime.kill("for the test")
    assert isinstance(await rig.next(), EngineLost)
    assert rig.y(1) == [[2]]
    rig.runtime.release()
    await rig.until(lambda: len(rig.starts) == 2)


async def test_last_words_are_the_reason(rig):
    """What the engine says before it ends, on whichever socket the end is seen first."""
    rig.engine.life.say(wire.EngineFailed("the device is lost"))
    rig.engine.life.kill()
    assert await rig.next() == EngineLost("the device is lost")


async def test_answers_before_the_end_still_count(rig):
    """A batch that ran is answered though the engine died right after it."""
    await rig.load("m/1")
    life = rig.engine.life
    rig.run(1, "m/1", [1])
    await rig.until(lambda: rig.engine.batches or rig.facts)
    life.kill()
    assert isinstance(await rig.next(), wire.BatchRan)
    assert await rig.next() == EngineLost("it ended")
    assert rig.y(1) == [[2]]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"\xff\xff\xff\xff", "it speaks nonsense: a frame of"),
        (b"\x01\x00\x00\x00\xc1", "it speaks nonsense: "),
        (wire.pack(wire.BatchRan(7, (), 0.0, 0)), "it speaks nonsense: batch 7 is not under way"),
        # Errors that are none of msgspec's: once they ended the agent.
        (b"\x0a\x00\x00\x00\x82\xa4type\xa2\xff\xfe\x01", "it speaks nonsense: "),
        (_framed(b"\x82\xa4type\xa8BatchRan\xa1z" + b"\x91" * 5000), "it speaks nonsense: "),
        (wire.pack(wire.ModelEvicted(ModelId("x/1"))), "it speaks nonsense: it speaks of a model"),
        (wire.pack(wire.EngineStarted("", "", "", 1, 1, "")), "it speaks nonsense: it started tw"),
        (wire.pack(wire.BatchRan(1, (), float("nan"), 0)), "it speaks nonsense: Expected"),
        (wire.pack(wire.BatchRan(1, (), float("inf"), 0)), "it speaks nonsense: Expected"),
        (wire.pack(wire.LoadFailed(ModelId("m/1"), "no code", "")), "it speaks nonsense: Invalid"),
        (wire.pack(wire.EngineFailed("m" * 5000)), "it speaks nonsense: Expected"),
    ],
)
async def test_an_engine_that_speaks_nonsense_is_ended(rig, said, reason):
    """It runs strangers' programs: it is not trusted to answer sensibly."""
    rig.engine.life.say(said)
    lost = await rig.next()
    assert isinstance(lost, EngineLost)
    assert lost.reason.startswith(reason)
    await rig.until(lambda: len(rig.starts) == 2)


@pytest.mark.parametrize(
    "ref",
    [
        wire.TensorRef("y", "FP32", (1,), OUTBOX_BYTES, 4),
        wire.TensorRef("y", "FP32", (1,), -4, 4),
        wire.TensorRef("y", "FP32", (2,), 0, 4),
        wire.TensorRef("y", "FP32", (-1, -1), 0, 4),
    ],
)
async def test_outputs_that_cannot_be_are_not_read(rig, ref):
    """Nothing outside the outbox, and no shape with other bytes."""
    await rig.load("slow/1")
    rig.engine.gate.clear()
    rig.run(1, "slow/1", [1])
    rig.engine.life.say(wire.pack(wire.BatchRan(1, (ref,), 0.0, 0)))
    lost = await rig.next()
    assert isinstance(lost, EngineLost)
    assert lost.reason.startswith("it speaks nonsense: ")
    rig.engine.gate.set()


async def test_an_engine_that_cannot_be_started_is_tried_again():
    """The core hears of each time."""

    async def refuse(*_):
        raise OSError("no more processes")

    rig = Rig()
    rig.runtime._launch = refuse
    task = asyncio.create_task(rig.runtime.run())
    for _ in range(2):
        assert await rig.next() == EngineLost("could not be started: no more processes")
    rig.runtime._launch = rig.engine.launch
    await rig.until(lambda: rig.starts)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_closing_ends_the_engine_for_good(rig):
    """In its own time, and nobody is told of a loss."""
    await rig.runtime.close()
    assert rig.engine.life.task.done()
    assert rig.facts == []
