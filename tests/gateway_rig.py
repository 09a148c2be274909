"""A gateway on a real port, over any broker, with a worker that is only a script."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import msgspec
import numpy as np

from services.gateway.app import run
from services.gateway.config import GatewayConfig
from services.worker.members import Pack
from shared import packs, v2
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import Broker, Delivery, Message
from shared.models import ModelSpec, TensorSpec
from shared.names import (
    HEADER_BATCH,
    HEADER_CODE,
    HEADER_COMPUTE_US,
    HEADER_LENGTH,
    HEADER_QUEUE_US,
    HEADER_RETRYABLE,
    HEADER_STATUS,
    ModelId,
    model_queue,
    split_model_id,
)
from shared.repository import Repository
from shared.store.memory import MemoryState, MemoryStore
from shared.tensors import from_numpy, to_numpy
from tests.archives import torchscript

SPEC = ModelSpec(
    inputs=(TensorSpec("x", "FP32", (3,)),),
    outputs=(TensorSpec("y", "FP32", (3,)),),
    max_batch_size=8,
)
JSON_BODY = {
    "id": "r1",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2.0, 3.0]}],
}

Script = Callable[["FakeWorker", Delivery], Awaitable[None]]


def reply_to(delivery: Delivery) -> Message:
    """What a right worker answers: y = x + 1."""
    message = delivery.message
    request = v2.decode_request(message.body, message.headers.get(HEADER_LENGTH))
    array = np.asarray(to_numpy(request.inputs[0])) + 1
    name = delivery.routing_key.partition("/")[0]
    body, length = v2.encode_response(
        name, 1, request.id, [from_numpy("y", array.astype(np.float32))], request
    )
    headers = {HEADER_CODE: "ok", HEADER_STATUS: 200, HEADER_QUEUE_US: 5}
    if length is not None:
        headers[HEADER_LENGTH] = length
    return Message(body=body, headers=headers, correlation_id=message.correlation_id)


def error_reply(delivery: Delivery, code: str, text: str, *, retryable: bool = False) -> Message:
    return Message(
        body=v2.error_body(text),
        headers={HEADER_CODE: code, HEADER_STATUS: 500, HEADER_RETRYABLE: retryable},
        correlation_id=delivery.message.correlation_id,
    )


async def serve_rightly(worker: FakeWorker, delivery: Delivery) -> None:
    await worker.reply(delivery, reply_to(delivery))
    await delivery.ack()


class FakeWorker:
    """Consumes one model's queue and does what its `script` says."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.script: Script = serve_rightly
        self.seen: list[Delivery] = []
        self.arrived = asyncio.Event()
        self._waiting: asyncio.Queue[Delivery] = asyncio.Queue()

    async def bind(self, model: ModelId) -> None:
        queue = model_queue(model)
        await self.broker.declare_queue(queue)
        await self.broker.bind(queue, model)
        await self.broker.bind(queue, split_model_id(model)[0])
        await self.broker.consume(queue, self._arrived, prefetch=100)

    def _arrived(self, delivery: Delivery) -> None:
        """Of a pack each member by itself, as a worker sees them."""
        if not packs.is_pack(delivery.message):
            self._waiting.put_nowait(delivery)
            return
        for member in Pack(delivery, self.broker.publish, lambda _: None).members:
            self._waiting.put_nowait(member)

    async def reply(self, delivery: Delivery, message: Message) -> None:
        assert delivery.message.reply_to is not None
        await self.broker.publish("", delivery.message.reply_to, message)

    async def work(self) -> None:
        while True:
            delivery = await self._waiting.get()
            self.seen.append(delivery)
            self.arrived.set()
            await self.script(self, delivery)


class Rig:
    """What a test has in hand."""

    def __init__(self, tmp_path, exchange: MemoryExchange | None) -> None:
        self.root = tmp_path / "repository"
        self.repository = Repository(str(self.root))
        self.exchange = exchange
        self.state = MemoryState()
        self.gateway_broker: Broker
        self.worker: FakeWorker
        self.http: httpx.AsyncClient
        self.port = 0
        self.grpc_port = 0
        """Of gRPC, which only a rig with the setting `grpc_port` has."""
        self.stop = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def register(self, name: str = "adder", spec: ModelSpec = SPEC) -> ModelId:
        digest, _ = self.repository.files.put([torchscript(name.encode() * 16)])
        return self.repository.register(name, None, spec, digest).id

    async def infer(self, body=None, name: str = "adder", **options) -> httpx.Response:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body or JSON_BODY)
        return await self.http.post(f"/v2/models/{name}/infer", content=content, **options)

    async def metric(self, line: str) -> float:
        """The value of a sample, 0 when it is not there."""
        text = (await self.http.get("/metrics")).text
        for sample in text.splitlines():
            if sample.startswith(line + " "):
                return float(sample.rpartition(" ")[2])
        return 0.0


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Waits until it holds; fails when it does not in time. May be a coroutine function."""
    async with asyncio.timeout(seconds):
        while True:
            held = condition()
            if asyncio.iscoroutine(held):
                held = await held
            if held:
                return
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(
    tmp_path,
    open_broker: Callable[[str], Broker] | None = None,
    *,
    connect: bool = True,
    **settings,
) -> AsyncIterator[Rig]:
    """A gateway that can take requests, and a worker bound to the registered model `adder`."""
    exchange = None
    if open_broker is None:
        exchange = MemoryExchange()

        def open_broker(name: str) -> Broker:
            return MemoryBroker(exchange, name)

    rig = Rig(tmp_path, exchange)
    model = rig.register()
    worker_broker = open_broker("worker")
    await worker_broker.start()
    rig.worker = FakeWorker(worker_broker)
    await rig.worker.bind(model)
    rig.gateway_broker = open_broker("gateway")
    listening = asyncio.Event()

    def on_ready(port: int) -> None:
        rig.port = port
        listening.set()

    def on_grpc_ready(port: int) -> None:
        rig.grpc_port = port

    settings = {"grpc_port": -1, "stop_delay_s": 0.0} | settings
    config = GatewayConfig(repository_url=str(tmp_path / "repository"), port=0, **settings)
    service = asyncio.create_task(
        run(
            config,
            rig.stop,
            broker=rig.gateway_broker,
            store=MemoryStore(rig.state),
            on_ready=on_ready,
            on_grpc_ready=on_grpc_ready,
        )
    )
    working = asyncio.create_task(rig.worker.work())
    try:
        async with asyncio.timeout(20):
            await listening.wait()
        async with httpx.AsyncClient(base_url=rig.url, timeout=30, trust_env=False) as rig.http:
            if connect:

                async def ready() -> bool:
                    return (await rig.http.get("/v2/health/ready")).status_code == 200

                await until(ready)
            yield rig
    finally:
        rig.stop.set()
        working.cancel()
        async with asyncio.timeout(30):
            await service
        await worker_broker.close()


@contextlib.asynccontextmanager
async def another_gateway(rig: Rig, **settings) -> AsyncIterator[httpx.AsyncClient]:
    """A second gateway beside the rig's (over the twins in memory), by its HTTP client."""
    assert rig.exchange is not None
    stop, listening = asyncio.Event(), asyncio.get_running_loop().create_future()
    service = asyncio.create_task(
        run(
            GatewayConfig(repository_url=str(rig.root), port=0, grpc_port=-1, **settings),
            stop,
            broker=MemoryBroker(rig.exchange, "gateway-2"),
            store=MemoryStore(rig.state),
            on_ready=listening.set_result,
        )
    )
    try:
        async with asyncio.timeout(20):
            url = f"http://127.0.0.1:{await listening}"
        async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:

            async def ready() -> bool:
                return (await http.get("/v2/health/ready")).status_code == 200

            await until(ready)
            yield http
    finally:
        stop.set()
        async with asyncio.timeout(30):
            await service


async def echo(worker: FakeWorker, delivery: Delivery) -> None:
    """A script: every input comes back as an output of the same name."""
    message = delivery.message
    request = v2.decode_request(message.body, message.headers.get(HEADER_LENGTH))
    body, length = v2.encode_response("echo", 1, request.id, request.inputs, request)
    headers = {HEADER_CODE: "ok", HEADER_STATUS: 200, HEADER_BATCH: 1, HEADER_COMPUTE_US: 2000}
    if length is not None:
        headers[HEADER_LENGTH] = length
    answer = Message(body=body, headers=headers, correlation_id=message.correlation_id)
    await worker.reply(delivery, answer)
    await delivery.ack()


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
