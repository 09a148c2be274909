"""The fleet's size: real agents (with an engine that needs no torch) under a real placer, over
the twins of broker and store in memory. And how fast, and how cheaply, the placer sees."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import time
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from roost.stack.scaler import Limits, Scaler, Step
from services.gateway.app import run as run_gateway
from services.gateway.config import GatewayConfig
from services.placer.core.policy import Policy
from services.placer.knowledge import Knowledge
from services.placer.metrics import Metrics
from services.placer.observe import Observer
from services.worker.app import run
from services.worker.config import WorkerConfig
from shared import names
from shared.broker.memory import MemoryBroker
from shared.catalog import TTL_S
from shared.models import ModelSpec, TensorSpec
from shared.names import ModelId, model_queue
from shared.repository import Repository
from shared.store.port import TOPIC_REGISTRY
from shared.tensors import from_numpy
from shared.v2 import InferRequest, encode_request
from tests.placer_rig import Placer, Rig, memory_rig, until
from tests.unit.worker.fake_engine import FakeEngine

BUDGET = 1 << 20


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with memory_rig(tmp_path) as made:
        yield made


class Agents:
    """Real workers by name; the task of one that was let go ends by itself."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.engines: dict[str, FakeEngine] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._stops: dict[str, asyncio.Event] = {}

    async def count(self, reporting: int) -> int:
        del reporting
        return sum(not task.done() for task in self.tasks.values())

    async def start(self, more: int, running: int) -> None:
        """As a scaler's runner does."""
        del running
        for _ in range(more):
            self.begin(f"w{len(self.tasks)}")

    def begin(self, name: str, **settings: object) -> None:
        stop, engine = asyncio.Event(), FakeEngine()
        config = WorkerConfig(
            worker_id=name,
            device="cpu",
            budget_bytes=BUDGET,
            repository_url=str(self.rig.root),
            data_dir=str(self.rig.root / name),
            report_interval_s=0.05,
            report_ttl_s=1.0,
            **settings,  # type: ignore[arg-type]
        )
        work = run(
            config,
            stop,
            broker=self.rig.open_broker(name),
            store=self.rig.open_store(),
            launch=engine.launch,
        )
        self.tasks[name] = asyncio.create_task(work, name=name)
        self._stops[name], self.engines[name] = stop, engine

    async def end(self) -> None:
        for engine in self.engines.values():
            engine.gate.set()
        for stop in self._stops.values():
            stop.set()
        for task in self.tasks.values():
            await task


@pytest.fixture
async def agents(rig: Rig) -> AsyncIterator[Agents]:
    made = Agents(rig)
    yield made
    await made.end()


SPEC = ModelSpec(
    inputs=(TensorSpec("x", "FP32", (2,)),),
    outputs=(TensorSpec("y", "FP32", (2,)),),
    max_batch_size=8,
)


def register(rig: Rig, name: str, size: int = 1000) -> ModelId:
    """A model with a file that looks like TorchScript from outside."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for part in ("data.pkl", "constants.pkl", "code/m.py", "version"):
            zipped.writestr(f"m/{part}", b"1")
        zipped.writestr("m/data/0", bytes(size))
    repository = Repository(str(rig.root))
    digest, _ = repository.files.put([file.getvalue()])
    return repository.register(name, 1, SPEC, digest).id


async def send(rig: Rig, name: str) -> str:
    body, length = encode_request(
        InferRequest(inputs=(from_numpy("x", np.ones((1, 2), np.float32)),), binary_default=True)
    )
    assert length is not None
    return await rig.send(name, body=body, headers={names.HEADER_LENGTH: length})


async def ask(rig: Rig, name: str) -> str:
    """The code of the answer."""
    return str((await rig.reply(await send(rig, name))).headers[names.HEADER_CODE])


async def post(placer: Placer, path: str, method: str = "POST", **more: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=placer.url, trust_env=False) as client:
        return await client.request(method, path, **more)  # type: ignore[arg-type]


async def fleet(placer: Placer) -> dict[str, list[str]]:
    answer = await placer.get("/fleet/workers-wanted")
    return answer.json() if answer.status_code == 200 else {"workers": [], "leaving": []}


async def until_fleet(placer: Placer, *workers: str, limit_s: float = 10.0) -> None:
    """Waits until exactly these report and stay, and nobody leaves."""
    end = time.monotonic() + limit_s
    while (seen := await fleet(placer))["workers"] != list(workers) or seen["leaving"]:
        assert time.monotonic() < end, seen
        await asyncio.sleep(0.02)


async def until_bound(placer: Placer, model: str, *workers: str) -> None:
    end = time.monotonic() + 10
    while True:
        story = (await placer.get(f"/explain/{model}")).json()
        if sorted(seat["worker"] for seat in story["workers"] if seat["bound"]) == list(workers):
            return
        assert time.monotonic() < end, story
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def steady_requests(rig: Rig, *models: str) -> AsyncIterator[list[str]]:
    """Asks all the time; yields the ids of what was sent. At the end everything was answered."""
    sent: list[str] = []
    stop = asyncio.Event()

    async def produce() -> None:
        while not stop.is_set():
            sent.extend([await send(rig, model) for model in models])
            await asyncio.sleep(0.003)

    producing = asyncio.create_task(produce())
    try:
        yield sent
    finally:
        stop.set()
        await producing
    for request in sent:
        reply = await rig.reply(request)
        assert reply.headers[names.HEADER_CODE] == "ok", reply
    assert all(len(rig.replies[request]) == 1 for request in sent)


async def test_a_drained_worker_hands_over_and_drops_nothing(rig, agents):
    """Under requests all the time: what it has is bound elsewhere first, everything is answered
    once, and the worker ends by itself."""
    for name in ("a", "b"):
        register(rig, name)
    agents.begin("w0")
    placer = await rig.start_placer()
    assert await ask(rig, "a") == await ask(rig, "b") == "ok"
    agents.begin("w1")
    await until_fleet(placer, "w0", "w1")
    async with steady_requests(rig, "a", "b") as sent:
        await until(lambda: len(sent) > 50)
        answer = await post(placer, "/fleet/workers/w0/drain")
        assert (answer.status_code, answer.json()["leaving"]) == (202, True)
        await until(agents.tasks["w0"].done, what="w0 ends")
        after = len(sent)
        await until(lambda: len(sent) > after + 20)
    agents.tasks["w0"].result()
    await until_fleet(placer, "w1")
    await until_bound(placer, "a", "w1")
    await until_bound(placer, "b", "w1")


async def test_a_worker_stays_until_somebody_else_can_serve(rig, agents):
    """With nobody to take over what is asked, the one that leaves goes on serving; taken back, it
    stays."""
    register(rig, "slow")
    agents.begin("w0")
    placer = await rig.start_placer()
    agents.engines["w0"].gate.clear()
    request = await send(rig, "slow")
    await until_bound(placer, "slow", "w0")
    await post(placer, "/fleet/workers/w0/drain")
    assert (await fleet(placer))["leaving"] == ["w0"]
    for _ in range(5):  # cycles pass, and it is still needed
        await asyncio.sleep(0.06)
        assert not agents.tasks["w0"].done()
    assert (await post(placer, "/fleet/workers/w0/drain", "DELETE")).json()["leaving"] is False
    agents.engines["w0"].gate.set()
    assert (await rig.reply(request)).headers[names.HEADER_CODE] == "ok"
    await until_fleet(placer, "w0")
    assert await ask(rig, "slow") == "ok"


async def test_the_next_placer_knows_who_leaves(rig, agents):
    """A placer that is killed takes nothing with it: its successor lets the worker go."""
    register(rig, "slow")
    agents.begin("w0")
    first = await rig.start_placer()
    agents.engines["w0"].gate.clear()
    request = await send(rig, "slow")
    await until_bound(first, "slow", "w0")
    await post(first, "/fleet/workers/w0/drain")
    await first.kill()
    second = await rig.start_placer()
    await second.until_leads()
    end = time.monotonic() + 10
    while (await fleet(second))["leaving"] != ["w0"]:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    agents.begin("w1")
    agents.engines["w0"].gate.set()
    assert (await rig.reply(request)).headers[names.HEADER_CODE] == "ok"
    await until(agents.tasks["w0"].done, what="w0 ends")
    await until_fleet(second, "w1")


async def test_shrinking_may_be_asked_again(rig):
    """The least missed goes; asked again with the same number, nobody else does."""
    register(rig, "a")
    await rig.start_worker("w0")
    placer = await rig.start_placer()
    await rig.ask("a")
    await rig.start_worker("w1")
    await until_fleet(placer, "w0", "w1")
    end = time.monotonic() + 5
    while (answer := await post(placer, "/fleet/shrink", params={"to": 1})).status_code == 503:
        assert time.monotonic() < end, "still waits for reports"
        await asyncio.sleep(0.02)
    assert (answer.status_code, answer.json()["worker"]) == (202, "w1")
    again = await post(placer, "/fleet/shrink", params={"to": 1})
    assert (again.status_code, again.json()["worker"]) == (200, None)
    assert (await post(placer, "/fleet/shrink")).json()["worker"] is None  # the least is 1
    drains = [each for each in rig.workers[1].assignments if each.drain]
    await until(lambda: drains or any(each.drain for each in rig.workers[1].assignments))


async def test_the_fleet_is_changed_by_who_may(rig):
    """Unknown workers and wrong numbers are refused, and so are browsers' pages."""
    await rig.start_worker("w0")
    placer = await rig.start_placer()
    await until_fleet(placer, "w0")
    assert (await post(placer, "/fleet/workers/nobody/drain")).status_code == 404
    assert (await post(placer, "/fleet/shrink", params={"to": "-1"})).status_code == 400
    page = {"headers": {"origin": "http://elsewhere"}}
    assert (await post(placer, "/fleet/workers/w0/drain", **page)).status_code == 400
    assert (await placer.get("/fleet/shrink")).status_code == 405
    assert (await fleet(placer))["workers"] == ["w0"]
    metrics = (await placer.get("/metrics")).text
    assert "roost_workers_wanted 1.0" in metrics
    assert 'roost_workers_wanted_reason{reason="demand"} 0.0' in metrics


async def test_a_fleet_goes_to_sleep_and_wakes_with_the_first_request(rig, agents):
    """Nobody asks: none is wanted, and the last one goes. A request then waits in its queue
    until a worker is there, and is answered."""
    register(rig, "a")
    placer = await rig.start_placer(min_workers=0, scale_to_zero_after_s=0.5)
    scaler = Scaler(placer.url, agents, Limits(0, 1))
    async with httpx.AsyncClient(base_url=placer.url, trust_env=False) as client:

        async def followed() -> bool:
            with contextlib.suppress(httpx.HTTPStatusError):
                await scaler.look(client)
            return all(task.done() for task in agents.tasks.values())

        request = await send(rig, "a")
        while request not in rig.replies:
            await followed()
            await asyncio.sleep(0.02)
        end = time.monotonic() + 15
        while not await followed():
            assert time.monotonic() < end, await fleet(placer)
            await asyncio.sleep(0.02)
        assert list(agents.tasks) == ["w0"]
        assert (await fleet(placer))["workers_wanted"] == 0
        again = await send(rig, "a")
        while again not in rig.replies:
            assert time.monotonic() < end, await fleet(placer)
            await followed()
            await asyncio.sleep(0.02)
    assert rig.replies[again][0].headers[names.HEADER_CODE] == "ok"
    assert list(agents.tasks) == ["w0", "w1"]


async def test_a_scaler_follows_what_is_asked_up_and_down(rig, agents):
    """Two models are asked, and one worker has room for one: another is started, and when nobody
    asks any more one goes. Everything is answered once."""
    for name in ("slow-a", "slow-b"):
        register(rig, name, size=BUDGET * 2 // 3)
    await agents.start(1, 0)
    placer = await rig.start_placer(shrink_after_s=0.5, deactivate_after_s=1.0)
    agents.engines["w0"].gate.clear()
    requests = [await send(rig, "slow-a")]
    await until_bound(placer, "slow-a", "w0")
    requests.append(await send(rig, "slow-b"))
    scaler = Scaler(placer.url, agents, Limits(1, 2))
    steps: list[Step] = []
    async with httpx.AsyncClient(base_url=placer.url, trust_env=False) as client:

        async def follow_until(done: Callable[[], bool]) -> None:
            end = time.monotonic() + 20
            while not done():
                assert time.monotonic() < end, await fleet(placer)
                with contextlib.suppress(httpx.HTTPStatusError):
                    steps.append(await scaler.look(client))
                await asyncio.sleep(0.02)

        await follow_until(lambda: requests[1] in rig.replies)
        assert list(agents.tasks) == ["w0", "w1"]
        assert requests[0] not in rig.replies
        agents.engines["w0"].gate.set()
        await follow_until(lambda: any(task.done() for task in agents.tasks.values()))
    for request in requests:
        assert (await rig.reply(request)).headers[names.HEADER_CODE] == "ok"
        assert len(rig.replies[request]) == 1
    assert sum(step.start for step in steps) == 1
    assert sum(step.shrink_to is not None for step in steps) == 1


# --- how fast ---------------------------------------------------------------------------------


async def test_a_spike_by_direct_publishing_is_relieved_at_once(rig):
    """Producers that never touch the gateway: from the report that says "saturated" to the
    second assignment it takes the placer milliseconds, not a tick."""
    register(rig, "hot")
    first = await rig.start_worker("w1")
    placer = await rig.start_placer(tick_s=2.0)
    await rig.ask("hot")
    second = await rig.start_worker("w2")
    end = time.monotonic() + 10
    while len((await placer.get("/fleet")).json()["workers"]) < 2:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    first.answering = False
    first.seconds_per_item = 0.05
    await asyncio.sleep(0)
    before = len(second.assignments)
    for _ in range(40):
        await rig.send("hot")
    await until(lambda: len(first.held.get(ModelId("hot/1"), ())) == first.prefetch)
    began = time.perf_counter()
    await first.send_report()
    await until(lambda: len(second.assignments) > before, what="a second assignment")
    took = time.perf_counter() - began
    assert took < 0.5, "it waited for the next tick"
    # The deed is counted when the cycle is done with all that it had to write.
    async with asyncio.timeout(5):
        while 'reflex_seconds_count{kind="starving"} 1.0' not in (
            metrics := (await placer.get("/metrics")).text
        ):
            await asyncio.sleep(0.01)
    total = metrics.split('reflex_seconds_sum{kind="starving"} ')[1].split()[0]
    assert float(total) < 0.1
    await first.release()


# --- how cheaply ------------------------------------------------------------------------------


class CountingBroker(MemoryBroker):
    """Counts questions for depths."""

    asked: int = 0

    async def depth(self, queue: str) -> int | None:
        self.asked += 1
        return await super().depth(queue)


async def test_a_look_asks_so_many_depths_at_most(rig):
    """However many models wait for a worker, one cycle asks the broker a bounded number of
    questions, and all get their turn."""
    assert rig.exchange is not None
    broker = CountingBroker(rig.exchange, "asks")
    await broker.start()
    knowledge = Knowledge(Policy())
    models = [rig.register(f"m{index}") for index in range(100)]
    for model in models:
        await broker.declare_queue(model_queue(model))
        knowledge.activate(model, None, why="test")
    observer = Observer(broker, rig.store, Metrics(), concurrency=4, limit=32)
    seen: set[ModelId] = set()
    for look in range(1, 5):
        seen |= (await observer.depths(knowledge)).keys()
        assert broker.asked == 32 * look
    assert seen == set(models)
    await broker.close()


async def test_thousands_of_idle_models_cost_nothing_while_nobody_asks(rig):
    """Registered is not active: no queue, no binding, no key and no depth asked; and placer and
    gateway together keep less than 2 KB of each, both having looked through all of them."""
    await rig.start_worker("w1")
    assert rig.exchange is not None
    assert rig.state is not None
    broker = CountingBroker(rig.exchange, "placer")
    placer = await rig.start_placer(broker=broker, lease_ttl_s=5.0)
    rig.register("asked")
    assert (await rig.ask("asked")).body == b"asked/1"
    await until(lambda: rig.exchange and len(rig.exchange.bindings) == 2)
    async with gateway(rig) as url:
        assert await _listed(url) == 1
        queues, keys = set(rig.exchange.queues), set(rig.exchange.bindings)
        count = 2_500  # 10,000: benchmarks/idle.py

        def register_all() -> None:
            for index in range(count):
                rig.register(f"idle{index}")

        await asyncio.to_thread(register_all)
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await rig.store.hint(TOPIC_REGISTRY)
            assert await _listed(url) == count + 1
            grown = float("inf")
            # What was looked through is kept for as long as it is believed, and no longer.
            end = time.monotonic() + 10 * TTL_S
            while grown >= 2048 and time.monotonic() < end:
                await asyncio.sleep(0.5)
                gc.collect()
                grown = (tracemalloc.get_traced_memory()[0] - before) / count
        finally:
            tracemalloc.stop()
        assert grown < 2048, f"{grown:.0f} bytes per model"
        assert set(rig.exchange.queues) == queues
        assert set(rig.exchange.bindings) == keys
        assert rig.state.active == {ModelId("asked/1")}
        # A worker that was kept from reporting (all share this process) is looked after meanwhile.
        for _ in range(5):
            asked = broker.asked
            await until_ticks(placer, await _ticks(placer) + 20)
            if broker.asked == asked:
                break
        assert broker.asked == asked
        assert (await placer.get("/fleet")).json()["active_models"] == 1


@contextlib.asynccontextmanager
async def gateway(rig: Rig) -> AsyncIterator[str]:
    """One in this process; yields its URL."""
    config = GatewayConfig(
        port=0, grpc_port=-1, repository_url=str(rig.root), data_dir=str(rig.root / "gateway")
    )
    stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        run_gateway(
            config,
            stop,
            broker=rig.open_broker("gateway"),
            store=rig.open_store(),
            on_ready=port.set_result,
        )
    )
    try:
        yield f"http://127.0.0.1:{await port}"
    finally:
        stop.set()
        await task


async def _listed(url: str) -> int:
    """How many versions of models the gateway's index has."""
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        answer = await client.post("/v2/repository/index", content=b"{}")
        assert answer.status_code == 200, answer.text
        return len(answer.json())


async def _ticks(placer: Placer) -> float:
    metrics = (await placer.get("/metrics")).text
    return float(metrics.split("roost_placer_tick_seconds_count ")[1].split()[0])


async def until_ticks(placer: Placer, count: float) -> None:
    end = time.monotonic() + 60
    while await _ticks(placer) < count:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
