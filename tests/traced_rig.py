"""All three services in one process, over the twins in memory and a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from roost.local.ports import free_ports
from services.gateway import app as gateway
from services.gateway.config import GatewayConfig
from services.placer import app as placer
from services.placer.config import PlacerConfig
from services.worker import app as worker
from services.worker.config import WorkerConfig
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.models import ModelSpec, TensorSpec
from shared.repository import Repository
from shared.store.memory import MemoryState, MemoryStore
from shared.tracing import Tracing
from tests.archives import torchscript
from tests.gateway_rig import until
from tests.unit.worker.fake_engine import FakeEngine

SPEC = ModelSpec(
    inputs=(TensorSpec("x", "FP32", (2,)),),
    outputs=(TensorSpec("y", "FP32", (2,)),),
    max_batch_size=8,
)
BODY = msgspec.json.encode(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}
)


class Traced:
    """The three services, and the spans that they have ended."""

    def __init__(self, path: Path) -> None:
        self.exchange, self.state = MemoryExchange(), MemoryState()
        self.repository = Repository(str(path / "repository"))
        self.engine = FakeEngine()
        self.exporter = InMemorySpanExporter()
        self.http: httpx.AsyncClient
        self.urls: list[str] = []
        """Of all three services."""

    def tracing(self) -> Tracing:
        # The sampler that operators would use: what a client says counts, else a ratio of all.
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(1.0)), shutdown_on_exit=False
        )
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        return Tracing(provider)

    def register(self, name: str, size: int = 100) -> None:
        digest, _ = self.repository.files.put([torchscript(name.encode().ljust(size, b"."))])
        self.repository.register(name, None, SPEC, digest)

    async def infer(self, name: str, **headers: str) -> httpx.Response:
        return await self.http.post(f"/v2/models/{name}/infer", content=BODY, headers=headers)

    async def scraped(self) -> list[str]:
        """The metrics of gateway, placer and worker."""
        return [(await self.http.get(f"{url}/metrics")).text for url in self.urls]

    def spans(self, trace: str | None = None) -> list[ReadableSpan]:
        found = self.exporter.get_finished_spans()
        return [s for s in found if trace is None or f"{s.context.trace_id:032x}" == trace]

    def span(self, name: str, trace: str | None = None) -> ReadableSpan:
        (found,) = [span for span in self.spans(trace) if span.name == name]
        return found

    async def settled(self, name: str, times: int = 1) -> None:
        """The worker settles a request after its answer has gone out."""
        await until(lambda: sum(span.name == name for span in self.spans()) == times)


@contextlib.asynccontextmanager
async def traced(path: Path) -> AsyncIterator[Traced]:
    rig, stop = Traced(path), asyncio.Event()
    ports: dict[str, asyncio.Future[int]] = {
        name: asyncio.get_running_loop().create_future() for name in ("gateway", "placer")
    }
    ready, where = asyncio.Event(), {"repository_url": str(path / "repository")}
    (metrics_port,) = free_ports(1)

    def twins(name: str) -> dict[str, object]:
        broker = MemoryBroker(rig.exchange, name)
        return {"broker": broker, "store": MemoryStore(rig.state), "tracing": rig.tracing()}

    works = WorkerConfig(
        worker_id="w0",
        device="cpu",
        budget_bytes=1 << 20,
        data_dir=str(path),
        report_interval_s=0.05,
        metrics_port=metrics_port,
        **where,
    )
    places = PlacerConfig(port=0, tick_s=0.05, heartbeat_s=0.1, **where)
    services = [
        asyncio.create_task(
            worker.run(
                works,
                stop,
                on_ready=lambda _: ready.set(),
                launch=rig.engine.launch,
                **twins("worker"),
            )
        ),
        asyncio.create_task(
            placer.run(places, stop, on_ready=ports["placer"].set_result, **twins("placer"))
        ),
        asyncio.create_task(
            gateway.run(
                GatewayConfig(port=0, grpc_port=-1, **where),
                stop,
                on_ready=ports["gateway"].set_result,
                **twins("gateway"),
            )
        ),
    ]
    try:
        async with asyncio.timeout(30):
            await ready.wait()
            rig.urls = [f"http://127.0.0.1:{await port}" for port in ports.values()]
            rig.urls.append(f"http://127.0.0.1:{metrics_port}")
        async with httpx.AsyncClient(base_url=rig.urls[0], timeout=30, trust_env=False) as rig.http:

            async def answers() -> bool:
                return (await rig.http.get("/v2/health/ready")).status_code == 200

            await until(answers)
            yield rig
    finally:
        rig.engine.gate.set()
        stop.set()
        async with asyncio.timeout(30):
            await asyncio.gather(*services)
