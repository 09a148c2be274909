"""Target: what an engine says that a stranger's program has taken over. The agent must end it,
fail its batches or go on, and itself stay sound: its core's laws hold, and what it tells others
(reports, replies, metrics) stays small and can be read."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import numpy as np
from prometheus_client import generate_latest

from services.worker import wire
from services.worker.agent import Agent
from services.worker.arena import Arena
from services.worker.core.events import (
    Assigned,
    ConsumerStarted,
    ConsumerStopped,
    EngineStarted,
    ModelFetched,
    StartConsumer,
)
from services.worker.core.laws import check
from services.worker.core.worker import WorkerCore
from services.worker.metrics import Metrics
from services.worker.reply import Replier
from services.worker.runtime import Runtime
from services.worker.telling import Teller
from shared import control
from shared.broker.port import Message
from shared.manifests import new_manifest
from shared.models import Case, Manifest, ModelSpec, Padding, TensorSpec
from shared.names import ModelId, split_model_id
from shared.supervise import Backoff
from shared.tensors import from_numpy
from shared.v2 import InferRequest, encode_request
from tests.fuzz.kit import target

_M, _N = ModelId("m/1"), ModelId("n/1")
_SPECS = {
    _M: ModelSpec(
        inputs=(TensorSpec("x", "FP32", (-1,)),), max_batch_size=4,
        padding=Padding(inputs={"x": 0}, sizes=(4, 8), outputs={"y": 0}),
    ),
    _N: ModelSpec(),
}  # fmt: skip
_REPORT_BYTES = 64 << 10
_LOADED = wire.ModelLoaded(_M, (TensorSpec("x", "FP32", (-1,)),), 100, 0.1, (Case(1, 4, 0.01),))
_MORE_LOADED = msgspec.structs.replace(_LOADED, model=_N, inputs=(), tier="host")
_STARTED = wire.EngineStarted("cpu", "cpu", "", 1 << 30, 1 << 20, "2.13")
_OUTPUT = wire.TensorRef("y", "FP32", (1, 4), 0, 16)


class _Process:
    pid = os.getpid()

    def __init__(self) -> None:
        self._ended = asyncio.Event()

    async def wait(self) -> int:
        await self._ended.wait()
        return 1

    def kill(self) -> None:
        self._ended.set()

    def hush(self) -> None: ...


class _Delivery:
    def __init__(self, number: int, *, packs: bool) -> None:
        x = from_numpy("x", np.ones((1, 3), np.float32))
        body, length = encode_request(InferRequest(inputs=(x,), binary_default=packs))
        headers = {"Inference-Header-Content-Length": length, "roost-packs": packs}
        self.message = Message(
            body=body, headers=headers, reply_to="roost.reply.t", correlation_id=f"c{number}"
        )
        self.malformed = None

    async def ack(self) -> None: ...
    async def requeue(self) -> None: ...
    async def dead_letter(self, reason: str) -> None:
        assert len(reason) < 3000


class _Broker:
    async def publish(self, _: str, __: str, message: Message, **___: object) -> None:
        assert len(message.body) < 1 << 20


class _Consumers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def start(self, order: StartConsumer) -> None:
        self._agent.tell(ConsumerStarted(order.subscription))

    def stop(self, id_: int) -> None:
        self._agent.tell(ConsumerStopped(id_))

    def close(self, _: int) -> None: ...
    def forget(self, _: ModelId) -> None: ...


class _Deaths:
    async def keep(self, order: Any) -> None:
        assert len(order.reason) < 3000


class _Reporter:
    def news(self) -> None: ...


class _Repository:
    def __init__(self) -> None:
        self.profiles = self

    def put(self, _: ModelId, profile: Any) -> None:
        msgspec.json.decode(msgspec.json.encode(profile), type=type(profile))


class _Agent(Agent):
    """Whose files are there at once, and which keeps measurements in memory."""

    async def _fetch(self, model: ModelId) -> None:
        manifest = _manifest(model)
        self._files[model] = cast("Any", _FILE)
        self._specs[model] = manifest
        self.tell(ModelFetched(model, manifest))

    async def _keep(self, model: ModelId, profile: Any) -> None:
        self._repository.profiles.put(model, profile)


class _File:
    extents = ()
    layout = None


_FILE = _File()


def _manifest(model: ModelId) -> Manifest:
    name, version = split_model_id(model)
    return new_manifest(name, version, _SPECS[model], "sha256:" + "0" * 64, 100)


class _Worker:
    """An agent around a runtime whose engine is a pair of sockets in our hands."""

    def __init__(self) -> None:
        core = WorkerCore()
        self.metrics = Metrics("w")
        self.agent = agent = _Agent(core, cast("Any", _Repository()), "", self.metrics)
        self.teller = Teller(core, "w", "i", 1 << 30, self.metrics, None)
        agent.consumers = cast("Any", _Consumers(agent))
        agent.deaths = cast("Any", _Deaths())
        agent.reporter = cast("Any", _Reporter())
        agent.replier = Replier(
            cast("Any", _Broker()), agent.settled, self.metrics, timeout_s=1, patience_s=0
        )
        agent.runtime = Runtime(
            self._launch, agent.tell, self._started, inbox_bytes=4096, outbox_bytes=4096,
            backoff=Backoff(100, 100),
        )  # fmt: skip
        self.teller.memory = lambda: agent.runtime.memory
        self.sockets: list[socket.socket] = []

    async def _launch(
        self, control: socket.socket, batches: socket.socket, inbox: Arena, outbox: Arena
    ) -> _Process:
        self.sockets = [control.dup(), batches.dup()]
        outbox.view[:64] = os.urandom(64)
        return _Process()

    def _started(self, started: wire.EngineStarted, _: int) -> None:
        self.teller.started = started
        self.agent.tell(EngineStarted(1 << 30, started.device_kind, 1 << 30))

    def say(self, line: int, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.sockets[line].setblocking(False)
            self.sockets[line].send(data)

    def ask(self, model: ModelId, number: int, *, packs: bool) -> None:
        agent = self.agent
        subscription = agent.core.subscriptions
        found = [s.id for s in subscription.all.values() if s.model == model]
        if found:
            delivery = cast("Any", _Delivery(number, packs=packs))
            agent.tell(
                agent.items.take(delivery, model, found[0], agent.spec_of(model), now=0.0, wall=0.0)
            )


async def _settled() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


async def _play(data: bytes) -> None:
    worker = _Worker()
    agent = worker.agent
    tasks = [asyncio.create_task(agent.run()), asyncio.create_task(agent.runtime.run())]
    try:
        await _settled()
        worker.say(0, wire.pack(_STARTED))
        agent.tell(Assigned((_M, _N)))
        await _settled()
        worker.say(0, wire.pack(_LOADED))
        await _settled()
        for number in range(3):
            worker.ask(_M, number, packs=bool(number & 1))
            await _settled()
        assert agent.runtime._life is not None
        for flags, piece in _pieces(data):
            worker.say(flags & 1, piece)
            await _settled()
            if flags & 2:
                worker.ask(_N, 9, packs=False)
                await _settled()
        for task in tasks:
            assert not task.done(), task.exception()
        # Not all of `core.validate()`: an engine may disown a model of which it still runs a batch.
        core = agent.core
        check(core.state)
        core.subscriptions.validate()
        core._held.validate(core.dispatch.places())
        report = worker.teller.report()
        told = control.encode(report)
        assert len(told) < _REPORT_BYTES, len(told)
        assert control.decode_report(told) == report
        _check_numbers(report)
        assert len(generate_latest(worker.metrics.registry)) < 200_000
    finally:
        for task in [*tasks, *agent._tasks, *agent.replier._tasks]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for each in worker.sockets:
            each.close()


def _check_numbers(report: control.Report) -> None:
    for model in report.models:
        for value in (model.busy_s, model.load_seconds, model.seconds_per_item):
            assert 0 <= value < math.inf, model
        assert 0 <= model.footprint.weights_bytes < 1 << 60
        assert 0 <= model.footprint.workspace_bytes < 1 << 60


def _said(*events: wire.Event, line: int = 0) -> bytes:
    frames = [wire.pack(event) for event in events]
    return b"".join(bytes([line]) + len(f).to_bytes(2, "big") + f for f in frames)


def _pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Flags, and what is written to a socket at once: bit 0 says to which, with bit 1 somebody asks
    the other model then."""
    at = 0
    for _ in range(16):
        if at >= len(data):
            return
        end = at + 3 + int.from_bytes(data[at + 1 : at + 3], "big")
        yield data[at], data[at + 3 : end]
        at = end


@target(
    _said(wire.BatchRan(1, (_OUTPUT,), 0.01, 5), line=1),
    _said(wire.BatchRan(1, (_OUTPUT,), 0.01, 5), wire.BatchFailed(2, "model_failed", "m"), line=1),
    _said(wire.BatchFailed(1, "resource_exhausted", "m"), line=1),
    _said(wire.BatchFailed(1, "not_found", "m"), line=1),
    _said(_MORE_LOADED),
    _said(wire.LoadFailed(_N, "resource_exhausted", "m"), wire.ModelEvicted(_M)),
    _said(wire.MemoryMeasured(5, 4, 3, 2), wire.EngineFailed("m"), _STARTED),
    words=(
        b"\xcb\x7f\xf8\0\0\0\0\0\0", b"\xcb\x7f\xf0\0\0\0\0\0\0", b"\xa7BatchRan", b"\xa4type",
        b"\xabBatchFailed", b"\xabModelLoaded", b"\xa3m/1", b"\xa3n/1", b"\xa5cases", b"\xa6inputs",
        b"\xa7outputs", b"\xa9compute_s", b"\x95\xa1y\xa4FP32", b"\xa5BYTES", b"\xa4host",
    ),
)  # fmt: skip
def engine_events(data: bytes) -> None:
    """What comes over the two sockets, while models are loaded and batches under way."""
    with asyncio.Runner() as runner:
        runner.run(_play(data))
