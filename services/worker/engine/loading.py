"""The thread that brings models onto the device and takes them off it, one at a time, in the
order of the commands."""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from services.worker.engine.dispatch import DeviceLost, Dispatcher, Resident
from services.worker.engine.executor import FORMATS, Executor
from services.worker.engine.failures import Diagnosis, Failed, diagnose
from services.worker.engine.memory import Device
from services.worker.engine.signature import merge
from services.worker.engine.tensors import bytes_of, zeros
from services.worker.wire import EvictModel, LoadFailed, LoadModel, ModelEvicted, ModelLoaded
from shared.fit import fit
from shared.models import Footprint, Manifest
from shared.names import ModelId

_WARM_RUNS: Final = 2
"""The first call of a model prepares plans and kernels; the second tells how long it takes."""


class Warmth(NamedTuple):
    """What the warm-up runs of one batch size told."""

    workspace_bytes: int
    seconds: float
    input_bytes: int


class Loader:
    """Owns what is resident: the only writer of the dispatcher's `residents`."""

    def __init__(
        self,
        device: Device,
        budget_bytes: int,
        dispatcher: Dispatcher,
        send: Callable[[ModelLoaded | LoadFailed | ModelEvicted], None],
    ) -> None:
        self._device = device
        self._budget_bytes = budget_bytes
        self._dispatcher = dispatcher
        self._residents = dispatcher.residents
        self._send = send
        self._work: queue.SimpleQueue[LoadModel | EvictModel | None] = queue.SimpleQueue()

    # --- from other threads

    def submit(self, command: LoadModel | EvictModel) -> None:
        self._work.put(command)

    def finish(self) -> None:
        """`serve` returns after what is queued."""
        self._work.put(None)

    # --- the loader thread

    def serve(self) -> None:
        """Until `finish`. Raises `DeviceLost`."""
        while (work := self._work.get()) is not None:
            if isinstance(work, LoadModel):
                self._send(self._answer(work))
            else:
                self._evict(work.model)
                self._send(ModelEvicted(work.model))

    def _answer(self, command: LoadModel) -> ModelLoaded | LoadFailed:
        known = self._residents.get(command.model)
        if known is not None:
            return known.loaded
        self._dispatcher.memory_moves.set()
        try:
            return self._load(command)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 — files raise anything
            why = diagnose(error)
        finally:
            self._dispatcher.memory_moves.clear()
        # Outside the except block: an error keeps alive what its frames hold.
        return self._recover(command.model, why)

    def _load(self, command: LoadModel) -> ModelLoaded:
        started = time.perf_counter()
        manifest, form = command.manifest, FORMATS[command.manifest.format]
        # 1. Is there room, by the size of the file's tensors?
        self._check_fit(form.estimate(command.path))
        # 2. Load, and ask again with what it really takes.
        executor = form.load(command.path, manifest, self._device.torch_device)
        self._device.synchronize()
        weights_bytes = executor.weights_bytes(self._device.granule)
        self._check_fit(weights_bytes)
        inputs = merge(executor.schema, manifest.inputs)
        # 3. Warm up on the dispatch thread, whose settings and stream the batches will have.
        self._dispatcher.memory_moves.clear()
        warmths: dict[int, Warmth] = {}
        if manifest.inputs is not None and not manifest.stateful:  # zeros would change its state
            for rows in command.warm_rows:
                warmth = self._warm_up(executor, manifest, rows)
                if warmth is not None:
                    warmths[rows] = warmth
        # 4. From here on batches find it.
        loaded = ModelLoaded(
            command.model,
            inputs,
            weights_bytes,
            {rows: warmth.workspace_bytes for rows, warmth in warmths.items()},
            {rows: warmth.seconds for rows, warmth in warmths.items()},
            time.perf_counter() - started,
        )
        measured = max((warmth.input_bytes for warmth in warmths.values()), default=0)
        self._residents[command.model] = Resident(executor, manifest, loaded, measured)
        return loaded

    def _check_fit(self, weights_bytes: int) -> None:
        """Weights alone: room for workspaces is planned by the agent, which knows them all."""
        residents = (Footprint(each.loaded.weights_bytes) for each in self._residents.values())
        refusal = fit(Footprint(weights_bytes), residents, self._budget_bytes)
        if refusal is not None:
            raise Failed("resource_exhausted", str(refusal))

    def _warm_up(self, executor: Executor, manifest: Manifest, rows: int) -> Warmth | None:
        """None when it failed, which says nothing of real requests: zeros need not suit the
        model."""

        def attempt() -> Warmth | Diagnosis:
            try:
                return self._measure(executor, manifest, rows)
            except Exception as error:  # noqa: BLE001 — models raise anything
                return diagnose(error)

        result = self._dispatcher.call(attempt)
        if isinstance(result, Warmth):
            return result
        print(  # noqa: T201 — the agent logs our stderr
            f"warm-up of {manifest.id} with {rows} rows failed: {result.message}",
            file=sys.stderr,
            flush=True,
        )
        self._device.reclaim()
        self._check_health(result)
        return None

    def _measure(self, executor: Executor, manifest: Manifest, rows: int) -> Warmth:
        """On the dispatch thread: the greatest peak and the last time of a few runs."""
        batched = manifest.max_batch_size > 0
        inputs = [
            (spec.name, zeros(spec, rows, batched=batched))
            for spec in manifest.inputs or ()
            if not spec.optional
        ]
        workspace_bytes, seconds = 0, 0.0
        for _ in range(_WARM_RUNS):
            self._device.begin_measuring()
            started = time.perf_counter()
            self._dispatcher.outputs_of(executor, manifest, inputs, rows)
            self._device.synchronize()
            seconds = time.perf_counter() - started
            workspace_bytes = max(workspace_bytes, self._device.peak_bytes())
        return Warmth(workspace_bytes, seconds, sum(bytes_of(value) for _, value in inputs))

    def _evict(self, model: ModelId) -> None:
        resident = self._residents.pop(model, None)
        if resident is None:
            return
        self._dispatcher.memory_moves.set()
        resident.executor.close()
        del resident
        self._device.reclaim()
        self._dispatcher.memory_moves.clear()

    def _recover(self, model: ModelId, why: Diagnosis) -> LoadFailed:
        self._device.reclaim()
        self._check_health(why)
        return LoadFailed(model, why.code, why.message)

    def _check_health(self, why: Diagnosis) -> None:
        if not self._device.healthy():
            raise DeviceLost(why.message)
