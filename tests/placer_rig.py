"""A placer among fake workers: they follow their assignments, report and answer as real ones do,
but hold no model. Over the twins in memory, or over real services."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from services.placer.app import run
from services.placer.config import PlacerConfig
from shared import names
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import Broker, Consumer, Delivery, Message
from shared.control import Assignment, ModelReport, Report
from shared.manifests import encode_manifest, manifest_path
from shared.models import Footprint, Manifest
from shared.names import ModelId
from shared.store.memory import MemoryState, MemoryStore
from shared.store.port import TOPIC_REGISTRY, TOPIC_REPORTS, Store, topic_assignment

MB = 1 << 20


async def until(condition: Callable[[], object], limit_s: float = 10.0, what: str = "") -> None:
    """Waits until the condition holds; fails the test when it does not in time."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what or condition}"
        await asyncio.sleep(0.005)


class FakeWorker:
    """One device of `budget` bytes. `loads(model)` says whether a model can be loaded."""

    def __init__(self, name: str, broker: Broker, store: Store, budget: int, size: int) -> None:
        self.name = name
        self.broker = broker
        self.store = store
        self.budget = budget
        self.size = size
        self.incarnation = uuid.uuid4().hex
        self.assignment: Assignment | None = None
        self.assignments: list[Assignment] = []
        self.consumers: dict[ModelId, Consumer] = {}
        self.failed: dict[ModelId, str] = {}
        self.loads: Callable[[ModelId], str | None] = lambda _: None
        self.answering = True
        self.engine_up = True
        self.finishing = False
        """Of what is unbound it keeps what it holds, as real workers do that still run it."""
        self.stopped: list[Consumer] = []
        self.reports = 0
        self.seconds_per_item = 0.001
        self.prefetch = 8
        self.held: dict[ModelId, list[Delivery]] = {}
        self.arrived: dict[ModelId, int] = {}
        self.last_used: dict[ModelId, float] = {}
        self.answered: list[tuple[ModelId, Message]] = []
        self._seq = 0
        self._answers: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> FakeWorker:
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._report())]
        return self

    async def die(self) -> None:
        """As by kill -9: it says nothing to nobody; what it held goes back."""
        for task in [*self._tasks, *self._answers]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._answers, return_exceptions=True)
        for consumer in [*self.consumers.values(), *self.stopped]:
            await consumer.close()
        self.consumers.clear()

    async def hang(self) -> None:
        """As by SIGSTOP: it consumes still, and its last report stands, for long."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.store.put_report(self.report(), ttl_s=60.0)

    @property
    def bound(self) -> set[ModelId]:
        return set(self.consumers)

    def report(self) -> Report:
        self._seq += 1
        wanted = [each.model for each in self.assignment.models] if self.assignment else []
        models = {*wanted, *self.arrived, *self.consumers}
        return Report(
            worker=self.name,
            incarnation=self.incarnation,
            seq=self._seq,
            at=time.time(),
            device_kind="cpu",
            device_name="fake",
            budget_bytes=self.budget,
            used_bytes=len(self.consumers) * self.size,
            measured_bytes=len(self.consumers) * self.size,
            generation=self.assignment.generation if self.assignment else 0,
            engine_up=self.engine_up,
            models=tuple(self._model(model) for model in sorted(models)),
        )

    def _model(self, model: ModelId) -> ModelReport:
        bound = model in self.consumers
        held = len(self.held.get(model, ()))
        return ModelReport(
            model=model,
            tier="device" if bound else "disk",
            phase="ready" if bound else "failed" if model in self.failed else "loading",
            bound=bound,
            footprint=Footprint(self.size, 0, measured=bound),
            held=held,
            saturated=held >= self.prefetch,
            arrived=self.arrived.get(model, 0),
            seconds_per_item=self.seconds_per_item if model in self.arrived else 0.0,
            last_used=self.last_used.get(model, 0.0),
            error=self.failed.get(model),
        )

    async def _follow(self) -> None:
        hints = self.store.hints(topic_assignment(self.name))
        reader = asyncio.ensure_future(anext(hints))
        while True:
            found = await self.store.assignment(self.name)
            if found is not None and found != self.assignment:
                self.assignments.append(found)
                await self._reconcile(found)
            done, _ = await asyncio.wait({reader}, timeout=0.2)
            if done:
                reader = asyncio.ensure_future(anext(hints))

    async def _reconcile(self, found: Assignment) -> None:
        self.assignment = found
        wanted = [each.model for each in found.models]
        for model in self.consumers.keys() - set(wanted):
            consumer = self.consumers.pop(model)
            if self.finishing:
                await consumer.cancel()
                self.stopped.append(consumer)
            else:
                await consumer.close()
                self.held.pop(model, None)
        self.failed = {model: why for model in wanted if (why := self.loads(model))}
        for model in wanted:
            if model in self.consumers or model in self.failed:
                continue
            queue = names.model_queue(model)
            await self.broker.declare_queue(queue)
            self.consumers[model] = await self.broker.consume(
                queue,
                lambda delivery, model=model: self._arrived(model, delivery),
                prefetch=self.prefetch,
                on_gone=lambda model=model: self.consumers.pop(model, None),
            )
        await self.send_report()

    async def _report(self) -> None:
        while True:
            await self.send_report()
            await asyncio.sleep(0.1)

    async def send_report(self) -> None:
        await self.store.put_report(self.report(), ttl_s=0.5)
        await self.store.hint(TOPIC_REPORTS)
        self.reports += 1

    def _arrived(self, model: ModelId, delivery: Delivery) -> None:
        self.arrived[model] = self.arrived.get(model, 0) + 1
        self.last_used[model] = time.time()
        self.held.setdefault(model, []).append(delivery)
        if self.answering:
            task = asyncio.create_task(self._answer(model, delivery))
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)

    async def release(self) -> None:
        """Answers what was held back, and everything from now on."""
        self.answering = True
        for model, held in list(self.held.items()):
            for delivery in list(held):
                await self._answer(model, delivery)

    async def _answer(self, model: ModelId, delivery: Delivery) -> None:
        request = delivery.message
        if request.reply_to:
            reply = Message(
                body=model.encode(),
                headers={names.HEADER_CODE: "ok"},
                correlation_id=request.correlation_id,
            )
            await self.broker.publish("", request.reply_to, reply)
        await delivery.ack()
        self.held[model].remove(delivery)
        self.answered.append((model, request))


@dataclass
class Rig:
    """Brokers and stores by name, a registry, a client with a reply queue, workers, placers."""

    root: Path
    open_broker: Callable[[str], Broker]
    open_store: Callable[[], Store]
    exchange: MemoryExchange | None = None
    state: MemoryState | None = None
    replies: dict[str, list[Message]] = field(default_factory=dict)
    workers: list[FakeWorker] = field(default_factory=list)
    _placers: list[tuple[asyncio.Event, asyncio.Task[None]]] = field(default_factory=list)
    _opened: list[Broker | Store] = field(default_factory=list)
    reply_to: str = ""
    broker: Broker = None  # type: ignore[assignment]  # set by `begin`
    store: Store = None  # type: ignore[assignment]

    async def begin(self) -> None:
        self.broker = self.open_broker("client")
        self.store = self.open_store()
        await self.broker.start()
        await self.store.start()
        self._opened += [self.broker, self.store]
        self.reply_to = f"{names.REPLY_QUEUE_PREFIX}{uuid.uuid4().hex}"
        await self.broker.declare_queue(self.reply_to)
        await self.broker.consume(self.reply_to, self._replied, prefetch=100)

    async def end(self) -> None:
        for stop, _ in self._placers:
            stop.set()
        for worker in self.workers:
            await worker.die()
        for _, task in self._placers:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for opened in self._opened:
            await opened.close()

    def _replied(self, delivery: Delivery) -> None:
        reply = delivery.message
        self.replies.setdefault(reply.correlation_id or "", []).append(reply)
        task = asyncio.create_task(delivery.ack())
        task.add_done_callback(lambda done: done.exception())

    def register(self, name: str, version: int = 1, size: int = MB, **spec: object) -> ModelId:
        manifest = Manifest(
            name=name,
            version=version,
            digest="sha256:" + "0" * 64,
            size_bytes=size,
            created_at=0.0,
            **spec,
        )
        path = self.root / manifest_path(name, version)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_manifest(manifest))
        return manifest.id

    async def remove(self, name: str, version: int = 1) -> None:
        (self.root / manifest_path(name, version)).unlink()
        await self.store.hint(TOPIC_REGISTRY)

    async def start_placer(
        self, *, broker: Broker | None = None, store: Store | None = None, **settings: object
    ) -> Placer:
        """Starts one and waits until it is ready."""
        config = PlacerConfig(
            repository_url=str(self.root),
            port=0,
            **{  # type: ignore[arg-type]
                "tick_s": 0.05,
                "lease_ttl_s": 0.8,
                "lease_renew_s": 0.1,
                "heartbeat_s": 0.2,
                "registry_check_s": 0.2,
                "victim_idle_s": 0.2,
                "victim_min_age_s": 0.2,
                "hold_down_s": 0.5,
                **settings,
            },
        )
        stop = asyncio.Event()
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(
            run(
                config,
                stop,
                broker=broker or self.open_broker("placer"),
                store=store or self.open_store(),
                on_ready=port.set_result,
            )
        )
        self._placers.append((stop, task))
        await asyncio.wait({port, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        placer = Placer(f"http://127.0.0.1:{port.result()}", stop, task)
        await placer.until_ready()
        return placer

    async def start_worker(self, name: str, models: int = 10, size: int = MB) -> FakeWorker:
        """A worker with room for `models` models of `size` bytes."""
        broker, store = self.open_broker(name), self.open_store()
        await broker.start()
        await store.start()
        self._opened += [broker, store]
        worker = FakeWorker(name, broker, store, models * size, size)
        self.workers.append(worker)
        return worker.start()

    async def send(self, routing_key: str, **properties: object) -> str:
        """Publishes one request as a producer does; returns its correlation id."""
        request = uuid.uuid4().hex
        message = Message(
            **{  # type: ignore[arg-type]
                "body": b"{}",
                "reply_to": self.reply_to,
                "correlation_id": request,
                **properties,
            },
        )
        await self.broker.publish(names.INFER_EXCHANGE, routing_key, message)
        return request

    async def reply(self, request: str, limit_s: float = 10.0) -> Message:
        await until(lambda: request in self.replies, limit_s, f"a reply to {request}")
        return self.replies[request][0]

    async def ask(self, routing_key: str, **properties: object) -> Message:
        return await self.reply(await self.send(routing_key, **properties))

    async def depth(self, queue: str) -> int | None:
        return await self.broker.depth(queue)

    async def gone(self, queue: str, limit_s: float = 10.0) -> None:
        """Waits until the queue is deleted."""
        end = time.monotonic() + limit_s
        while await self.broker.depth(queue) is not None:
            assert time.monotonic() < end, f"{queue} is still there"
            await asyncio.sleep(0.02)


class Placer:
    """A running placer, and what it tells."""

    def __init__(self, url: str, stop: asyncio.Event, task: asyncio.Task[None]) -> None:
        self.url = url
        self.stop = stop
        self.task = task

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            return await client.get(path)

    async def until_ready(self, limit_s: float = 10.0) -> None:
        end = time.monotonic() + limit_s
        while (await self.get("/readyz")).status_code != 200:
            assert time.monotonic() < end, "not ready"
            await asyncio.sleep(0.02)

    async def until_leads(self, limit_s: float = 10.0) -> None:
        end = time.monotonic() + limit_s
        while (await self.get("/fleet")).status_code != 200:
            assert time.monotonic() < end, "does not lead"
            await asyncio.sleep(0.02)

    async def end(self) -> None:
        self.stop.set()
        await self.task

    async def kill(self) -> None:
        """Without its orderly end: nobody releases its lease."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@contextlib.asynccontextmanager
async def memory_rig(root: Path) -> AsyncIterator[Rig]:
    """Everything in this process."""
    exchange, state = MemoryExchange(), MemoryState()
    rig = Rig(
        root,
        lambda name: MemoryBroker(exchange, name),
        lambda: MemoryStore(state),
        exchange,
        state,
    )
    await rig.begin()
    try:
        yield rig
    finally:
        await rig.end()


__all__ = ["MB", "FakeWorker", "Placer", "Rig", "memory_rig", "until"]
