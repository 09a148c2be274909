"""The orderly end of each service: what it holds is finished or given back, and nothing is answered
twice. Over a real RabbitMQ and Redis; engines and the other side of a gateway are scripts."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import httpx
import numpy as np
import pytest

from services.gateway.app import run as run_gateway
from services.gateway.config import GatewayConfig
from services.placer.app import run as run_placer
from services.placer.config import PlacerConfig
from services.worker.app import run as run_worker
from services.worker.config import WorkerConfig
from shared.broker.amqp import AmqpBroker
from shared.broker.port import Delivery, Message
from shared.connect import open_store
from shared.control import Assigned, Assignment
from shared.models import ModelSpec, TensorSpec
from shared.names import (
    HEADER_CODE,
    HEADER_LENGTH,
    INFER_EXCHANGE,
    REPLY_QUEUE_PREFIX,
    UNROUTED,
    ModelId,
    model_queue,
)
from shared.repository import Repository
from shared.store.port import topic_assignment
from shared.tensors import from_numpy
from shared.v2 import InferRequest, encode_request
from tests.archives import torchscript
from tests.gateway_rig import JSON_BODY, until
from tests.torchscript_files import weights
from tests.unit.worker.fake_engine import FakeEngine

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]
SPEC = ModelSpec(
    inputs=(TensorSpec("x", "FP32", (2,)),),
    outputs=(TensorSpec("y", "FP32", (2,)),),
    max_batch_size=4,
)


def body_of(x: list[list[float]]) -> tuple[bytes, int]:
    """A request's body, and the length of its header."""
    inputs = (from_numpy("x", np.array(x, np.float32)),)
    body, length = encode_request(InferRequest(inputs=inputs, binary_default=True))
    assert length is not None
    return body, length


class Service:
    """One that runs in this process, and can be asked to end."""

    def __init__(self, task: asyncio.Task[None], stop: asyncio.Event) -> None:
        self.task = task
        self.stop = stop

    async def end(self, within_s: float) -> float:
        """Asks it to end; returns after how many seconds it has, which is within so many."""
        began = time.monotonic()
        self.stop.set()
        async with asyncio.timeout(within_s):
            await self.task
        return time.monotonic() - began


class Place:
    """Broker, store and registry of one test, a producer, and services as they are wanted."""

    def __init__(self, folder: Path, amqp_url: str, redis_url: str) -> None:
        self.amqp_url, self.redis_url, self.folder = amqp_url, redis_url, folder
        self.root = str(folder / "repository")
        self.repository = Repository(self.root)
        self.store = open_store(redis_url)
        self.broker = AmqpBroker(amqp_url, "producer")
        self.reply_to = f"{REPLY_QUEUE_PREFIX}{uuid.uuid4().hex}"
        self.replies: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.engines: dict[str, FakeEngine] = {}
        self.names: list[str] = []
        self._services: list[Service] = []
        self._acks: set[asyncio.Task[None]] = set()
        self._generation = 0

    def register(self, name: str, *, swappable: bool = False) -> ModelId:
        content = torchscript(name.encode() * 16)
        if swappable:  # of a kind that a worker keeps in the host's memory too
            content = weights(w=np.full(256, len(self.names), np.float32).tobytes())
        self.names.append(name)
        digest, _ = self.repository.files.put([content])
        return self.repository.register(name, 1, SPEC, digest).id

    def begin(self, work, stop: asyncio.Event) -> Service:
        service = Service(asyncio.create_task(work), stop)
        self._services.append(service)
        return service

    async def worker(self, name: str, *, wait: bool = True, **settings) -> Service:
        stop, ready, engine = asyncio.Event(), asyncio.Event(), FakeEngine()
        self.engines[name] = engine
        config = WorkerConfig(
            **{
                "worker_id": name,
                "device": "cpu",
                "budget_bytes": "1MiB",
                "repository_url": self.root,
                "data_dir": str(self.folder / name),
                "amqp_url": self.amqp_url,
                "redis_url": self.redis_url,
                **settings,
            }
        )
        service = self.begin(
            run_worker(config, stop, on_ready=lambda _: ready.set(), launch=engine.launch), stop
        )
        if wait:
            async with asyncio.timeout(60):
                await ready.wait()
        return service

    async def bind(self, worker: str, *models: ModelId, wait: bool = True) -> None:
        self._generation += 1
        await self.store.put_assignment(
            Assignment(
                worker=worker,
                fence=1,
                generation=self._generation,
                models=tuple(Assigned(model) for model in models),
            )
        )
        await self.store.hint(topic_assignment(worker))

        async def bound() -> bool:
            reports = [each for each in await self.store.reports() if each.worker == worker]
            return {m.model for each in reports for m in each.models if m.bound} == set(models)

        if wait:
            await until(bound, 30)

    async def gateway(self, **settings) -> tuple[Service, str]:
        stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
        config = GatewayConfig(
            **{
                "amqp_url": self.amqp_url,
                "redis_url": self.redis_url,
                "repository_url": self.root,
                "port": 0,
                "grpc_port": -1,
                **settings,
            }
        )
        service = self.begin(run_gateway(config, stop, on_ready=port.set_result), stop)
        url = f"http://127.0.0.1:{await port}"
        await until(lambda: _is(url, "/v2/health/ready"), 60)
        return service, url

    async def placer(self, **settings) -> tuple[Service, str]:
        stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
        config = PlacerConfig(
            **{
                "amqp_url": self.amqp_url,
                "redis_url": self.redis_url,
                "repository_url": self.root,
                "port": 0,
                "heartbeat_s": 0.2,
                **settings,
            }
        )
        service = self.begin(run_placer(config, stop, on_ready=port.set_result), stop)
        url = f"http://127.0.0.1:{await port}"
        await until(lambda: _is(url, "/readyz"), 60)
        return service, url

    async def send(self, model: str, count: int, *, queue: bool = True) -> list[str]:
        """Publishes so many requests; returns their correlation ids."""
        body, length = body_of([[1.0, 1.0]])
        ids = [uuid.uuid4().hex for _ in range(count)]
        exchange, key = ("", model_queue(ModelId(model))) if queue else (INFER_EXCHANGE, model)
        for id_ in ids:
            message = Message(
                body=body,
                headers={HEADER_LENGTH: length},
                reply_to=self.reply_to,
                correlation_id=id_,
            )
            await self.broker.publish(exchange, key, message)
        return ids

    async def answered(self, ids: list[str], limit_s: float = 60.0) -> None:
        """Waits until each was answered, and fails when one was answered twice."""
        await until(lambda: all(self.replies[id_] for id_ in ids), limit_s)
        assert max(self.replies.values()) == 1, "answered twice"
        assert self.codes.keys() == {"ok"}, self.codes

    def _heard(self, delivery: Delivery) -> None:
        self.replies[delivery.message.correlation_id or ""] += 1
        self.codes[str(delivery.message.headers[HEADER_CODE])] += 1
        task = asyncio.create_task(delivery.ack())
        self._acks.add(task)
        task.add_done_callback(self._acks.discard)

    async def __aenter__(self) -> Self:
        await self.store.start()
        await self.broker.start()
        await self.broker.declare_queue(self.reply_to)
        await self.broker.consume(self.reply_to, self._heard, prefetch=1000)
        return self

    async def __aexit__(self, *_: object) -> None:
        for engine in self.engines.values():
            engine.gate.set()
        for service in self._services:
            service.stop.set()
        for service in self._services:
            with contextlib.suppress(asyncio.CancelledError):
                await service.task
        await self.broker.close()
        await self.store.close()


async def _is(url: str, path: str, status: int = 200) -> bool:
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            return (await client.get(url + path)).status_code == status
        except httpx.HTTPError:
            return False


@pytest.fixture
async def place(tmp_path: Path, amqp_url: str, redis_url: str) -> AsyncIterator[Place]:
    async with Place(tmp_path, amqp_url, redis_url) as made:
        yield made


# --- workers ---------------------------------------------------------------------------------


async def test_a_worker_ends_under_load_and_each_request_is_answered_once(place):
    """What it has begun it answers; what it prefetched, and the rest, the other one does."""
    model = place.register("echo")
    first, _ = await place.worker("w0"), await place.worker("w1")
    await place.bind("w0", model)
    await place.bind("w1", model)
    sending = asyncio.create_task(place.send(model, 600))
    await until(lambda: place.replies.total() >= 100)
    await first.end(within_s=20)
    assert any(rows for _, rows in place.engines["w0"].batches), "it had its share"
    await place.answered(await sending)
    assert await place.broker.depth(model_queue(model)) == 0


async def test_what_hangs_as_a_worker_ends_is_another_s(place):
    """A batch that does not end within the grace is given back, and not answered here as well,
    even where its engine comes round in that very moment."""
    model = place.register("slow")
    first = await place.worker("w0", drain_grace_s=0.3)
    await place.bind("w0", model)
    place.engines["w0"].gate.clear()
    ids = await place.send(model, 10)
    await until(lambda: place.engines["w0"].life.room is not None and not place.replies)
    took = asyncio.create_task(first.end(within_s=20))
    await asyncio.sleep(0.3)
    place.engines["w0"].gate.set()
    assert await took < 10
    await place.worker("w1")
    await place.bind("w1", model)
    await place.answered(ids)


async def test_a_worker_ends_while_it_loads(place):
    """A load under way holds nothing up: what waits for the model goes back at once."""
    echo, stuck = place.register("echo"), place.register("stuck")
    worker = await place.worker("w0")
    await place.bind("w0", echo)
    place.engines["w0"].gate.clear()
    await place.bind("w0", echo, stuck, wait=False)
    await until(lambda: [each.model for each in place.engines["w0"].loads] == [echo, stuck])
    ids = await place.send(echo, 5)
    await place.answered(ids)
    assert await worker.end(within_s=20) < 10
    assert await place.store.reports() == []


async def test_what_waits_for_a_swap_goes_back_as_a_worker_ends(place):
    """A model that is being brought from the host's memory has requests: they are another's."""
    models = [place.register(name, swappable=True) for name in ("stuck", "m0", "m1", "m2", "m3")]
    stuck, *others = models
    worker = await place.worker("w0", budget_bytes=5000, host_bytes="1MiB")
    await place.bind("w0", *models)
    for model in others:
        await place.answered(await place.send(model, 1))
    assert stuck not in place.engines["w0"].life.models, "two of them have room on the device"
    place.engines["w0"].gate.clear()
    loads = len(place.engines["w0"].loads)
    ids = await place.send(stuck, 5)
    await until(lambda: len(place.engines["w0"].loads) > loads)
    assert await worker.end(within_s=20) < 10
    assert await place.broker.depth(model_queue(stuck)) == 5
    await place.worker("w1")
    await place.bind("w1", stuck)
    await place.answered(ids)


@pytest.mark.parametrize("broker_is_there", [True, False])
async def test_a_worker_ends_before_it_was_ready(place, broker_is_there):
    """Asked to end as it starts, it does: its engine and its broker are not waited for."""
    url = {} if broker_is_there else {"amqp_url": "amqp://guest:guest@127.0.0.1:1/"}
    worker = await place.worker("w0", wait=False, drain_grace_s=60.0, **url)
    assert await worker.end(within_s=30) < 15
    assert await place.store.reports() == []


# --- placers ---------------------------------------------------------------------------------


async def test_the_stand_by_leads_as_soon_as_a_placer_ends(place):
    """Neither the lease's time nor the next look at it is waited for."""
    slow = {"lease_ttl_s": 60.0, "lease_renew_s": 25.0}
    first, url = await place.placer(**slow)
    await until(lambda: _is(url, "/fleet"))
    _, other = await place.placer(**slow)
    assert not await _is(other, "/fleet")
    began = time.monotonic()
    await first.end(within_s=20)
    await until(lambda: _is(other, "/fleet"), 15)
    assert time.monotonic() - began < 15


async def test_a_placer_ends_under_load_and_each_request_is_answered_once(place):
    """First requests for many models, of which some are in its hands as it is asked to end: it
    passes them on, or the next placer does."""
    names = [f"echo-{number}" for number in range(12)]
    for name in names:
        place.register(name)
    await place.worker("w0")
    first, _ = await place.placer()
    await place.placer()
    sending = asyncio.gather(*(place.send(name, 20, queue=False) for name in names))
    await until(lambda: place.replies.total() >= 5, 30)
    assert await first.end(within_s=20) < 10
    await place.answered([id_ for ids in await sending for id_ in ids])
    assert await place.broker.depth(UNROUTED) == 0


async def test_what_a_placer_cannot_place_goes_back_as_it_ends(place):
    """Without a worker a request waits in its model's queue, and nothing stays with the placer."""
    place.register("echo")
    first, url = await place.placer()
    await until(lambda: _is(url, "/fleet"))
    ids = await place.send("echo", 8, queue=False)
    await until(lambda: _depth_is(place, model_queue(ModelId("echo/1")), 8))
    assert await first.end(within_s=20) < 10
    await place.worker("w0")
    await place.placer()
    await place.answered(ids)


async def _depth_is(place: Place, queue: str, depth: int) -> bool:
    return await place.broker.depth(queue) == depth


# --- gateways --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        yield client


async def served(place: Place) -> None:
    """A worker that answers `echo`, reached by its name."""
    model = place.register("echo")
    await place.worker("w0")
    await place.bind("w0", model)
    await place.broker.bind(model_queue(model), "echo")


BODY = {"inputs": [{**JSON_BODY["inputs"][0], "shape": [1, 2], "data": [1.0, 2.0]}]}


async def test_a_gateway_says_that_it_ends_before_it_takes_no_more(place):
    """Readiness turns false first; requests are still answered, each the last of its connection;
    then the port closes, idle connections with it."""
    await served(place)
    service, url = await place.gateway(stop_delay_s=60.0)
    async with asking(url) as client, asking(url) as idle:
        assert (await idle.get("/v2/health/live")).headers.get("connection") != "close"
        before = await client.post("/v2/models/echo/infer", json=BODY)
        assert before.headers.get("connection") != "close"
        service.stop.set()
        await until(lambda: _is(url, "/v2/health/ready", 503))
        told = await client.get("/v2/health/ready")
        assert told.json() == {"error": "the gateway is stopping"}
        answer = await client.post("/v2/models/echo/infer", json=BODY)
        assert answer.json()["outputs"][0]["data"] == [2.0, 4.0]
        assert answer.headers["connection"] == "close"
    service.task.cancel()


async def test_a_gateway_ends_under_load_and_each_request_has_one_answer(place):
    """Of many clients, each is answered right, told that the gateway stops, or finds it gone
    before it asked: none is cut off. Nothing is left in the broker, not even its own queue."""
    await served(place)
    service, url = await place.gateway(stop_delay_s=0.5)
    done: Counter[str] = Counter()

    async def client() -> None:
        async with asking(url) as http:
            while True:
                try:
                    answer = await http.post("/v2/models/echo/infer", json=BODY)
                except (httpx.ConnectError, httpx.ReadError):
                    # A reset, too: of a connection that the kernel had made and nobody had taken.
                    # One that was taken and is cut off ends instead (RemoteProtocolError).
                    done["gone"] += 1
                    return
                except httpx.HTTPError as error:
                    done[type(error).__name__] += 1
                    return
                done[str(answer.status_code)] += 1
                if answer.status_code != 200:
                    return

    clients = [asyncio.create_task(client()) for _ in range(24)]
    await until(lambda: done["200"] > 200, 60)
    assert await service.end(within_s=30) < 15
    await asyncio.wait(clients)
    assert done["200"] > 200
    assert done.keys() <= {"200", "503", "gone"}, done
    assert await place.broker.depth(model_queue(ModelId("echo/1"))) == 0


async def test_an_upload_that_does_not_end_leaves_nothing_behind(place):
    """After the grace an upload is told 503 (or finds its connection closed, as it still writes),
    and nothing half-written stays in the repository."""
    service, url = await place.gateway(stop_delay_s=0.0, stop_grace_s=0.0)
    reached = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100_000):
            yield bytes(1 << 16)
            reached.set()
            await asyncio.sleep(0.05)

    async with asking(url) as client:
        path = f"/v2/repository/blobs/sha256:{'0' * 64}"
        upload = asyncio.create_task(client.put(path, content=endless()))
        await reached.wait()
        assert await service.end(within_s=30) < 15
        with contextlib.suppress(httpx.HTTPError):
            assert (await upload).status_code == 503
    left = [path for path in Path(place.root).rglob("*") if path.is_file()]
    assert not [path for path in left if path.stat().st_size >= 1 << 16], left


async def test_a_job_under_way_is_another_gateway_s(place):
    """It is handed back at once, with its note, and ends once, there."""
    model = place.register("echo")
    service, url = await place.gateway()
    async with asking(url) as client:
        told = await client.post("/v2/models/echo/jobs", json=BODY)
        job = told.json()["id"]

        # It has its turn: its request waits where no worker is.
        await place.broker.declare_queue(model_queue(model))
        await place.broker.bind(model_queue(model), "echo")
        assert await service.end(within_s=30) < 15
    await place.worker("w0")
    await place.bind("w0", model)
    _, other = await place.gateway()
    async with asking(other) as client:

        async def over() -> bool:
            return (await client.get(f"/v2/jobs/{job}")).json()["state"] == "succeeded"

        await until(over, 60)
        result = (await client.get(f"/v2/jobs/{job}/result")).json()
        assert result["outputs"][0]["data"] == [2.0, 4.0]
