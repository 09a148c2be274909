"""Warm-ups: what batches of a model take, measured with zeros before its first request."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from services.worker.engine.dispatch import Dispatcher
from services.worker.engine.executor import Executor
from services.worker.engine.failures import Diagnosis, diagnose
from services.worker.engine.grapher import recover
from services.worker.engine.memory import Device
from services.worker.engine.tensors import Value, bytes_of, zeros
from services.worker.wire import WarmUp
from shared.models import Case, Manifest, TensorSpec

_RUNS: Final = 2
"""The first call of a model prepares plans and kernels; the second tells how long it takes."""


class Warmth(NamedTuple):
    """What the warm-ups of one model told."""

    cases: tuple[Case, ...]
    input_bytes: int
    """Inputs of the greatest batch whose workspace was measured."""


class Moves:
    """Loads and evictions under way, in any thread: a peak measured meanwhile tells nothing."""

    def __init__(self, moving: threading.Event) -> None:
        """`moving` is set while there are any."""
        self._moving = moving
        self._lock = threading.Lock()
        self._under_way = 0
        self._begun = 0

    def __enter__(self) -> None:
        with self._lock:
            self._under_way += 1
            self._begun += 1
            self._moving.set()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._under_way -= 1
            if not self._under_way:
                self._moving.clear()

    def quiet(self) -> int | None:
        """The same number at two times when nothing moved from the one to the other."""
        with self._lock:
            return None if self._under_way else self._begun


def may_be_warmed(manifest: Manifest) -> bool:
    """Inputs must be known; and zeros would change a state."""
    return manifest.inputs is not None and not manifest.stateful


class Warmer:
    """Runs warm-ups on the dispatch thread, whose settings and stream the batches will have."""

    def __init__(self, device: Device, dispatcher: Dispatcher, moves: Moves) -> None:
        self._device = device
        self._dispatcher = dispatcher
        self._moves = moves

    def warm_up(self, executor: Executor, manifest: Manifest, batches: Sequence[WarmUp]) -> Warmth:
        """A case for each batch that ran. One that failed says nothing of real requests, since
        zeros need not suit the model: it is only told to the log. Raises `DeviceLost`."""
        cases: list[Case] = []
        input_bytes = 0
        for batch in batches:
            inputs = zero_inputs(manifest, batch)
            case = self._case(executor, manifest, batch, inputs)
            if isinstance(case, Case):
                cases.append(case)
                if case.workspace_bytes:
                    input_bytes = max(input_bytes, sum(bytes_of(value) for _, value in inputs))
                continue
            print(  # noqa: T201 — the agent logs our stderr
                f"warm-up of {manifest.id} with {batch.rows} rows failed: {case.message}",
                file=sys.stderr,
                flush=True,
            )
            recover(self._device, case)
        return Warmth(tuple(cases), input_bytes)

    def _case(
        self,
        executor: Executor,
        manifest: Manifest,
        batch: WarmUp,
        inputs: list[tuple[str, Value]],
    ) -> Case | Diagnosis:
        """The greatest peak and the last time of a few runs. Each waits its turn, so that
        batches of other models run between them."""

        def run() -> tuple[float, int] | Diagnosis:
            try:
                return self._measured_run(executor, manifest, inputs, batch.rows)
            except Exception as error:  # noqa: BLE001 — models raise anything
                return diagnose(error)

        seconds, workspace_bytes = 0.0, 0
        for _ in range(_RUNS):
            result = self._dispatcher.call(run)
            if isinstance(result, Diagnosis):
                return result
            seconds = result[0]
            workspace_bytes = max(workspace_bytes, result[1])
        return Case(batch.rows, batch.size, seconds, workspace_bytes)

    def _measured_run(
        self, executor: Executor, manifest: Manifest, inputs: list[tuple[str, Value]], rows: int
    ) -> tuple[float, int]:
        """On the dispatch thread: seconds, and the peak if nothing else moved it."""
        before = self._moves.quiet()
        self._device.begin_measuring()
        started = time.perf_counter()
        self._dispatcher.outputs_of(executor, manifest, inputs, rows)
        self._device.synchronize()
        seconds = time.perf_counter() - started
        peak_bytes = self._device.peak_bytes()
        quiet = before is not None and before == self._moves.quiet()
        return seconds, peak_bytes if quiet else 0


def zero_inputs(manifest: Manifest, batch: WarmUp) -> list[tuple[str, Value]]:
    """One batch of nothing: the inputs that every request has to give, the padded dimension
    filled up to the batch's size."""
    batched = manifest.max_batch_size > 0
    return [
        (spec.name, zeros(_padded(spec, manifest, batch.size), batch.rows, batched=batched))
        for spec in manifest.inputs or ()
        if not spec.optional
    ]


def _padded(spec: TensorSpec, manifest: Manifest, size: int) -> TensorSpec:
    at = manifest.padding.inputs.get(spec.name) if manifest.padding is not None else None
    if at is None or not size:
        return spec
    return msgspec.structs.replace(spec, shape=(*spec.shape[:at], size, *spec.shape[at + 1 :]))
