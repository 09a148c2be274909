"""A real engine process behind the agent's own runtime, driven without broker and placer."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, Literal, TypeVar

import torch

from benchmarks.models import Registered
from services.worker import wire
from services.worker.confinement.plan import Confinement
from services.worker.core.events import EngineLost, Fact, RunBatch
from services.worker.launch import launcher
from services.worker.runtime import Runtime
from shared.models import ModelSpec
from shared.names import ModelId
from shared.tensors import Tensor, from_numpy, to_numpy
from shared.v2 import InferRequest

_BOX_BYTES: Final = 64 << 20
_PATIENCE_S: Final = 300.0

T = TypeVar("T")
Tier = Literal["host", "device"]


class Failed(Exception):
    """The engine said no, or died."""


class Engine:
    """One engine. Everything is awaited; several batches may be under way."""

    def __init__(self, device: str, budget_bytes: int, host_bytes: int, *, share: bool) -> None:
        # As workers start theirs, but that it finds the models wherever they are.
        confinement = Confinement("auto", readable=("/",))
        launch = launcher(
            device,
            budget_bytes,
            threads=1,
            host_bytes=host_bytes,
            share=share,
            confinement=confinement,
        )
        self.runtime: Final = Runtime(
            launch, self._tell, self._on_started, inbox_bytes=_BOX_BYTES, outbox_bytes=_BOX_BYTES
        )
        self.started: asyncio.Future[wire.EngineStarted] = asyncio.Future()
        self.pid = 0
        self._numbers = itertools.count(1)
        self._batches: dict[int, asyncio.Future[wire.BatchRan]] = {}
        self._models: dict[ModelId, asyncio.Future[wire.ModelLoaded | wire.ModelEvicted]] = {}
        self._specs: dict[ModelId, ModelSpec] = {}

    async def load(
        self,
        model: Registered,
        *,
        tier: Tier = "device",
        keep_host: bool = False,
        warm: Sequence[int] = (),
    ) -> wire.ModelLoaded:
        """Raises `Failed`."""
        name = model.manifest.id
        self._specs[name] = model.manifest
        answer = self._models[name] = asyncio.Future()
        self.runtime.load(
            name,
            model.file,
            model.manifest,
            model.layout,
            tuple(wire.WarmUp(rows) for rows in warm),
            tier,
            keep_host=keep_host,
        )
        loaded = await _soon(answer)
        assert isinstance(loaded, wire.ModelLoaded)
        return loaded

    async def evict(self, model: Registered, tier: Tier = "device") -> None:
        answer = self._models[model.manifest.id] = asyncio.Future()
        self.runtime.evict(model.manifest.id, tier)
        await _soon(answer)

    async def run(self, model: Registered, request: InferRequest, rows: int) -> wire.BatchRan:
        """One batch; its outputs are let go. Raises `Failed`."""
        ran, _ = await self._run(model, request, rows, keep=False)
        return ran

    async def answer(self, model: Registered, request: InferRequest, rows: int) -> torch.Tensor:
        """The first output of one batch."""
        _, outputs = await self._run(model, request, rows, keep=True)
        return torch.from_numpy(to_numpy(outputs[0]).copy())

    async def _run(
        self, model: Registered, request: InferRequest, rows: int, *, keep: bool
    ) -> tuple[wire.BatchRan, list[Tensor]]:
        number = next(self._numbers)
        answer = self._batches[number] = asyncio.Future()
        name = model.manifest.id
        self.runtime.run_batch(RunBatch(number, name, (number,), rows), [request], model.manifest)
        ran = await _soon(answer)
        outputs = self.runtime.outputs(number) if keep else []
        if keep:
            outputs = [
                Tensor(each.name, each.datatype, each.shape, bytes(each.data)) for each in outputs
            ]
        self.runtime.release()
        return ran, outputs

    def _on_started(self, event: wire.EngineStarted, pid: int) -> None:
        self.pid = pid
        if not self.started.done():
            self.started.set_result(event)

    def _tell(self, fact: Fact) -> None:
        match fact:
            case wire.BatchRan():
                self._batches.pop(fact.batch).set_result(fact)
            case wire.BatchFailed():
                self._batches.pop(fact.batch).set_exception(Failed(fact.message))
            case wire.ModelLoaded() | wire.ModelEvicted():
                self._models.pop(fact.model).set_result(fact)
            case wire.LoadFailed():
                self._models.pop(fact.model).set_exception(Failed(fact.message))
            case EngineLost():
                waiting: list[asyncio.Future[Any]] = [self.started]
                waiting += [*self._batches.values(), *self._models.values()]
                for future in waiting:
                    if not future.done():
                        future.set_exception(Failed(fact.reason))
            case _:
                pass


@contextlib.asynccontextmanager
async def engine(
    device: str, budget_bytes: int, host_bytes: int = 0, *, share: bool = True
) -> AsyncIterator[tuple[Engine, wire.EngineStarted]]:
    """Started, and ended at the end."""
    driven = Engine(device, budget_bytes, host_bytes, share=share)
    running = asyncio.create_task(driven.runtime.run(), name="engine")
    try:
        yield driven, await _soon(driven.started)
    finally:
        await driven.runtime.close()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def request(inputs: Sequence[torch.Tensor], names: Sequence[str]) -> InferRequest:
    tensors = tuple(from_numpy(name, t.numpy()) for name, t in zip(names, inputs, strict=True))
    return InferRequest(inputs=tensors)


async def settle(driven: Engine, seconds: float = 0.0) -> wire.MemoryMeasured:
    """What the engine last said of its memory, after so long. It says so with every load."""
    await asyncio.sleep(seconds)
    if driven.runtime.memory is None:
        raise Failed("the engine has loaded nothing yet")
    return driven.runtime.memory


async def _soon(future: asyncio.Future[T]) -> T:
    async with asyncio.timeout(_PATIENCE_S):
        return await future
