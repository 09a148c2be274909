"""SIGTERM to every service of a real stack, one after the other, under load: each ends with status
0 within its grace, and no request is lost, answered twice, or answered with an error."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from benchmarks.soakmodels import WIDTH, SoakModel, body, register
from roost.local.ports import free_ports
from roost.stack.port import StackConfig
from roost.stack.processes import ProcessStack
from roost.stack.waiting import wait_for_url
from shared.broker.port import Delivery, Message
from shared.models import ModelSpec, TensorSpec
from shared.names import HEADER_CODE, INFER_EXCHANGE, REPLY_QUEUE_PREFIX
from shared.repository import Repository

pytestmark = [pytest.mark.services, pytest.mark.torch, pytest.mark.timeout(600)]
RATE = 40.0
"""Requests per second over AMQP; as many clients as gateways ask over HTTP beside them."""
DOCKER_S = 10.0
"""Within which container engines want a process to end, unless they are told otherwise."""


class Stack(ProcessStack):
    """Two of each service."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            StackConfig(data_dir=folder, workers=2, budget_bytes=64 << 20, device="cpu")
        )
        self.repository = Repository(str(folder / "repository"))
        self.urls: dict[str, str] = {}

    async def start(self) -> None:
        await super().start()
        port, placer_port = free_ports(2)
        ports = {"ROOST_GATEWAY_PORT": str(port), "ROOST_GATEWAY_GRPC_PORT": "-1"}
        self._spawn("gateway-2", ports)
        self._spawn("placer-2", {"ROOST_PLACER_PORT": str(placer_port)})
        self.urls = {
            "gateway": f"{self.gateway_url}/v2/health/ready",
            "gateway-2": f"http://127.0.0.1:{port}/v2/health/ready",
            "placer": f"{self.placer_url}/readyz",
            "placer-2": f"http://127.0.0.1:{placer_port}/readyz",
        }
        for name in ("gateway-2", "placer-2"):
            await wait_for_url(self.urls[name], name, self._check_alive)

    def gateways(self) -> list[str]:
        return [
            self.urls[name].removesuffix("/v2/health/ready") for name in ("gateway", "gateway-2")
        ]

    async def terminate(self, name: str, *, twice: bool = False) -> int | None:
        """Its exit status."""
        process, _ = self._services[name]
        for _ in range(1 + twice):
            psutil.Process(process.pid).send_signal(signal.SIGTERM)
            await asyncio.sleep(1.0 if twice else 0.0)
        end = time.monotonic() + 60
        while process.returncode is None and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return process.returncode

    async def again(self, name: str) -> None:
        """Starts another in its place, and waits until that can be used."""
        _, extra = self._services[name]
        self._spawn(name, extra)
        if name.startswith("worker"):
            async with asyncio.timeout(120):
                while not any(w["worker"] == name and w["engine_up"] for w in await self.fleet()):
                    await asyncio.sleep(0.1)
        else:
            await wait_for_url(self.urls[name], name, self._check_alive)

    async def fleet(self) -> list[dict[str, Any]]:
        """The workers, as whichever placer leads tells of them."""
        async with httpx.AsyncClient(trust_env=False) as http:
            for name in ("placer", "placer-2"):
                answer = await http.get(self.urls[name].replace("/readyz", "/fleet"))
                if answer.status_code == httpx.codes.OK:
                    found: list[dict[str, Any]] = answer.json()["workers"]
                    return found
        return []


class Load:
    """Asks without pause, as careful clients do, and keeps a book of it."""

    def __init__(self, stack: Stack, models: list[SoakModel]) -> None:
        self.stack, self.models = stack, models
        self.answers: Counter[str] = Counter()
        self.sent: list[str] = []
        self.wrong: list[str] = []
        self.over_http = 0
        self._acks: set[asyncio.Task[None]] = set()
        self._expected: dict[str, list[float]] = {}

    async def produce(self, stop: asyncio.Event) -> None:
        """Over AMQP, until `stop` and until all of it was answered."""
        broker = await self.stack.producer()
        reply_to = f"{REPLY_QUEUE_PREFIX}{uuid.uuid4().hex}"
        await broker.declare_queue(reply_to)
        await broker.consume(reply_to, self._heard, prefetch=1000)
        for number in itertools.count():
            if stop.is_set():
                break
            model, id_ = self.models[number % len(self.models)], uuid.uuid4().hex
            x = [number % 50 + each for each in range(WIDTH)]
            self._expected[id_] = model.answer(x)
            message = Message(body=body(x), reply_to=reply_to, correlation_id=id_)
            await broker.publish(INFER_EXCHANGE, model.name, message)
            self.sent.append(id_)
            await asyncio.sleep(1 / RATE)
        end = time.monotonic() + 60
        while any(not self.answers[id_] for id_ in self.sent) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await broker.close()

    def _heard(self, delivery: Delivery) -> None:
        message = delivery.message
        id_ = message.correlation_id or ""
        self.answers[id_] += 1
        if message.headers[HEADER_CODE] != "ok":
            self.wrong.append(f"amqp: {message.body!r}")
        elif json.loads(message.body)["outputs"][0]["data"] != self._expected[id_]:
            self.wrong.append("amqp: another one's answer")
        task = asyncio.create_task(delivery.ack())
        self._acks.add(task)
        task.add_done_callback(self._acks.discard)

    async def ask(self, first: int, stop: asyncio.Event) -> None:
        """Over HTTP: one gateway, and the other where that takes nobody any more."""
        urls = self.stack.gateways()
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
            for number in itertools.count():
                if stop.is_set():
                    return
                model = self.models[number % len(self.models)]
                x = [number % 50 + each for each in range(WIDTH)]
                path = f"/v2/models/{model.name}/infer"
                for which in (first, first + 1):
                    try:
                        answer = await http.post(urls[which % 2] + path, content=body(x))
                    except httpx.ConnectError:
                        continue  # it was not accepted
                    except httpx.HTTPError as error:
                        self.wrong.append(f"http: {error!r}")
                        break
                    if answer.headers.get("retry-after"):
                        continue  # it was not accepted: this one has only just started
                    if answer.status_code != httpx.codes.OK:
                        self.wrong.append(f"http: {answer.status_code} {answer.text}")
                    elif answer.json()["outputs"][0]["data"] != model.answer(x):
                        self.wrong.append("http: another one's answer")
                    self.over_http += 1
                    break
                else:
                    self.wrong.append("http: no gateway")
                await asyncio.sleep(0.02)


def test_each_service_ends_in_order_under_load(tmp_path):
    """Workers, placers and gateways: while one is replaced, the others serve."""
    asyncio.run(_each_in_turn(tmp_path))


async def _each_in_turn(folder: Path) -> None:
    stack = Stack(folder)
    try:
        await stack.start()
        models = await asyncio.to_thread(register, stack.repository, alike=3, own=0, writing=0)
        load, stop = Load(stack, models), asyncio.Event()
        statuses: dict[str, int | None] = {}
        took: dict[str, float] = {}
        async with asyncio.TaskGroup() as group:
            for work in (load.produce(stop), load.ask(0, stop), load.ask(1, stop)):
                group.create_task(work)
            await asyncio.sleep(2)
            for name in ("worker-0", "placer", "placer-2", "gateway"):
                began = time.monotonic()
                statuses[name] = await stack.terminate(name)
                took[name] = time.monotonic() - began
                await stack.again(name)
            stop.set()
        assert set(statuses.values()) == {0}, statuses
        assert max(took.values()) < DOCKER_S, took
        assert load.wrong == []
        assert Counter(load.answers[id_] for id_ in load.sent) == {1: len(load.sent)}
        assert load.over_http > 100
    finally:
        await stack.close()


class _Endless(torch.nn.Module):
    """Runs until it is killed, unless it is given zeros, as in a warm-up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() > 0):
            x = x + 0
        return x


def test_a_second_signal_ends_a_worker_at_once(tmp_path):
    """Who asks twice does not want to wait for what runs: the engine goes too, though it hangs,
    and the request is another worker's."""
    asyncio.run(_twice(tmp_path))


async def _twice(folder: Path) -> None:
    stack = Stack(folder)
    try:
        await stack.start()
        file = folder / "endless.pt"
        torch.jit.script(_Endless()).save(str(file))
        inputs = (TensorSpec("x", "FP32", (WIDTH,)),)
        spec = ModelSpec(
            inputs=inputs, outputs=(TensorSpec("y", "FP32", (WIDTH,)),), max_batch_size=1
        )
        digest, _ = stack.repository.files.put([file.read_bytes()])
        await asyncio.to_thread(stack.repository.register, "endless", 1, spec, digest)
        broker = await stack.producer()
        reply_to = f"{REPLY_QUEUE_PREFIX}{uuid.uuid4().hex}"
        await broker.declare_queue(reply_to)
        message = Message(body=body([1] * WIDTH), reply_to=reply_to, correlation_id="1")
        await broker.publish(INFER_EXCHANGE, "endless", message)
        busy = await _hanging(stack)
        engines = psutil.Process(stack.pids()[busy]).children(recursive=True)
        assert engines
        assert await stack.terminate(busy, twice=True) == 128 + signal.SIGTERM
        _, alive = psutil.wait_procs(engines, timeout=20)
        assert alive == []
        (other,) = set(stack.workers()) - {busy}
        assert await _hanging(stack, other) == other
        await broker.close()
        await stack.terminate(other, twice=True)
    finally:
        await stack.close()


async def _hanging(stack: Stack, *among: str) -> str:
    """The worker that holds the request, once there is one."""
    async with asyncio.timeout(120):
        while True:
            for worker in await stack.fleet():
                name = str(worker["worker"])
                if any(m["held"] for m in worker["models"]) and name in (among or stack.workers()):
                    return name
            await asyncio.sleep(0.1)
