"""Accepted jobs against everything that can be restarted, with RabbitMQ and Redis of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from roost.local.rabbit import RabbitNode
from roost.local.redis import RedisNode
from services.gateway.app import run
from services.gateway.config import GatewayConfig
from shared.broker.amqp import AmqpBroker
from shared.repository import Repository
from tests.archives import torchscript
from tests.gateway_rig import SPEC, FakeWorker, serve_rightly, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]
JOBS = 12


class Fleet:
    """Broker and store that a test may hurt, gateways and workers that it may restart."""

    def __init__(self, folder: Path) -> None:
        self.rabbit = RabbitNode(folder / "rabbit", management=False)
        self.redis = RedisNode(folder / "redis")
        self.root = str(folder / "repository")
        repository = Repository(self.root)
        digest, _ = repository.files.put([torchscript(b"adder" * 16)])
        self.model = repository.register("adder", None, SPEC, digest).id

    @contextlib.asynccontextmanager
    async def gateway(self, **settings) -> AsyncIterator[httpx.AsyncClient]:
        """One that is dropped at the end, not stopped: what it had under way, it leaves lying."""
        listening = asyncio.get_running_loop().create_future()
        config = GatewayConfig(
            amqp_url=self.rabbit.amqp_url,
            redis_url=self.redis.url,
            repository_url=self.root,
            port=0,
            grpc_port=-1,
            **settings,
        )
        service = asyncio.create_task(
            run(config, asyncio.Event(), on_ready=listening.set_result), name="gateway"
        )
        try:
            async with asyncio.timeout(30):
                url = f"http://127.0.0.1:{await listening}"
            async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:

                async def ready() -> bool:
                    return (await http.get("/v2/health/ready")).status_code == 200

                await until(ready, 60)
                yield http
        finally:
            service.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await service

    @contextlib.asynccontextmanager
    async def worker(self, script=serve_rightly) -> AsyncIterator[FakeWorker]:
        broker = AmqpBroker(self.rabbit.amqp_url, "worker")
        await broker.start()
        worker = FakeWorker(broker)
        worker.script = script
        await worker.bind(self.model)
        working = asyncio.create_task(worker.work())
        try:
            yield worker
        finally:
            working.cancel()
            await broker.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    made.rabbit.start()
    made.redis.start()
    yield made
    made.rabbit.kill()
    made.redis.kill()


def body(number: int) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [float(number), 0.0, 0.0]}
    return msgspec.json.encode({"inputs": [tensor]})


async def submit(http: httpx.AsyncClient, number: int) -> str:
    headers = {"Idempotency-Key": f"job-{number}"}
    answer = await http.post("/v2/models/adder/jobs", content=body(number), headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


async def check_all(http: httpx.AsyncClient, jobs: list[str]) -> None:
    """Every job ends well, with the answer to its own request."""
    for number, job in enumerate(jobs):

        async def over(job=job) -> bool:
            told = (await http.get(f"/v2/jobs/{job}")).json()
            assert told["state"] in {"queued", "succeeded"}, told
            return told["state"] == "succeeded"

        await until(over, 120)
        result = await http.get(f"/v2/jobs/{job}/result")
        assert result.status_code == 200
        assert result.json()["outputs"][0]["data"] == [number + 1.0, 1.0, 1.0]


async def silent(worker, delivery):
    """A script: the worker dies before it answers."""


async def test_jobs_survive_a_restart_of_everything(fleet):
    """Some wait in their queue, some are at a worker; then all goes: worker, gateway, Redis with
    all it knew, and the broker."""
    async with fleet.gateway(job_prefetch=4) as http:
        async with fleet.worker(silent) as worker:
            jobs = [await submit(http, number) for number in range(JOBS)]
            await worker.arrived.wait()
        await asyncio.to_thread(fleet.redis.kill)
        await asyncio.to_thread(fleet.rabbit.stop)
    await asyncio.to_thread(fleet.rabbit.start)
    await asyncio.to_thread(fleet.redis.start)
    async with fleet.gateway() as http, fleet.worker():
        await check_all(http, jobs)


async def test_jobs_go_on_after_the_broker_was_killed(fleet):
    """The gateways stay and connect again; Redis has been flushed meanwhile."""
    async with fleet.gateway(job_prefetch=4) as http:
        async with fleet.worker(silent) as worker:
            jobs = [await submit(http, number) for number in range(JOBS)]
            await worker.arrived.wait()
            await asyncio.to_thread(fleet.rabbit.kill)
            assert (await http.post("/v2/models/adder/jobs", content=body(0))).status_code == 503
        await asyncio.to_thread(fleet.redis.flush)
        await asyncio.to_thread(fleet.rabbit.start)
        async with fleet.worker():
            await check_all(http, jobs)


async def test_results_survive_a_restart_of_everything(fleet):
    """What was answered before can be fetched after, from a gateway that never saw it run; and who
    submits it again is told so. No worker is there."""
    async with fleet.gateway() as http, fleet.worker():
        jobs = [await submit(http, number) for number in range(3)]
        await check_all(http, jobs)
    await asyncio.to_thread(fleet.rabbit.stop)
    await asyncio.to_thread(fleet.redis.kill)
    await asyncio.to_thread(fleet.rabbit.start)
    await asyncio.to_thread(fleet.redis.start)
    async with fleet.gateway() as http:
        await check_all(http, jobs)
        assert [await submit(http, number) for number in range(3)] == jobs
