"""Warm-ups: what batches of a model take, measured with zeros before its first request."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Iterable
from typing import Final, NamedTuple

import msgspec
import torch

from services.worker.engine.dispatch import Dispatcher
from services.worker.engine.executor import Executor
from services.worker.engine.failures import Diagnosis, diagnose
from services.worker.engine.memory import Device
from services.worker.engine.recovery import recover
from services.worker.engine.tensors import Value, bytes_of, zeros
from services.worker.wire import WarmUp
from shared.models import Case, Manifest, TensorSpec

_RUNS: Final = 2
"""The first run of a shape prepares kernels; the second tells how long it takes."""


class Warmth(NamedTuple):
    """What the warm-ups of one model told."""

    cases: dict[Hashable, Case | None]
    """By what was run (`asked`); None where that failed."""
    input_bytes: int
    """Inputs of the greatest batch whose workspace was measured."""


def asked(manifest: Manifest, batches: Iterable[WarmUp]) -> dict[Hashable, WarmUp]:
    """The batches by what a program runs for them: the same of two models is the same work, so
    it need be measured only once. None where zeros would change a state, or the inputs are not
    known."""
    if manifest.inputs is None or manifest.stateful:
        return {}
    padded = {} if manifest.padding is None else manifest.padding.inputs
    kind = (
        manifest.max_batch_size > 0,
        tuple((each, padded.get(each.name)) for each in manifest.inputs if not each.optional),
    )
    return {(kind, each.rows, each.size): each for each in batches}


class Warmer:
    """Runs warm-ups for the grapher, in whose thread it is called."""

    def __init__(self, device: Device, dispatcher: Dispatcher) -> None:
        self._device = device
        self._dispatcher = dispatcher

    def warm_up(
        self,
        executor: Executor,
        manifest: Manifest,
        batches: dict[Hashable, WarmUp],
        *,
        fresh: bool,
    ) -> Warmth:
        """A case for each batch that ran, the small ones first. One that failed says nothing of
        real requests, since zeros need not suit the model: it is only told to the log. `fresh`:
        the program has never run, and nobody else runs it yet. Raises `DeviceLost`."""
        if fresh:
            self._prepare(executor, manifest, batches.values())
        cases: dict[Hashable, Case | None] = {}
        input_bytes = 0
        for key, batch in sorted(batches.items(), key=lambda item: _volume(item[1])):
            inputs = zero_inputs(manifest, batch)
            case = self._case(executor, manifest, batch, inputs)
            if isinstance(case, Case):
                cases[key] = case
                if case.workspace_bytes:
                    input_bytes = max(input_bytes, sum(bytes_of(value) for _, value in inputs))
                continue
            cases[key] = None
            print(  # noqa: T201 — the agent logs our stderr
                f"warm-up of {manifest.id} with {batch.rows} rows failed: {case.message}",
                file=sys.stderr,
                flush=True,
            )
            recover(self._device, case)
        return Warmth(cases, input_bytes)

    def _prepare(self, executor: Executor, manifest: Manifest, batches: Iterable[WarmUp]) -> None:
        """The first call of a program makes its plans, which takes many times as long as another
        one: here, so that batches run meanwhile. With a single row, for which there is always
        memory besides them. Should it fail, the next call will tell."""
        least = min(batches, key=_volume)
        inputs = zero_inputs(manifest, msgspec.structs.replace(least, rows=1))
        try:
            with self._dispatcher.unrest, torch.inference_mode():
                executor.run(inputs)
                self._device.synchronize()
        except Exception as error:  # noqa: BLE001 — models raise anything
            why = diagnose(error)
        else:
            return
        # Outside the except block: an error keeps alive what its frames hold.
        recover(self._device, why)

    def _case(
        self,
        executor: Executor,
        manifest: Manifest,
        batch: WarmUp,
        inputs: list[tuple[str, Value]],
    ) -> Case | Diagnosis:
        """The greatest peak and the last time of a few runs: on the dispatch thread, whose
        settings and stream the batches will have, and whose memory is planned for one batch at
        a time. Each waits its turn, so that batches of other models run between them."""

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
        before = self._dispatcher.unrest.quiet()
        self._device.begin_measuring()
        started = time.perf_counter()
        self._dispatcher.outputs_of(executor, manifest, inputs, rows)
        self._device.synchronize()
        seconds = time.perf_counter() - started
        peak_bytes = self._device.peak_bytes()
        quiet = before is not None and before == self._dispatcher.unrest.quiet()
        return seconds, peak_bytes if quiet else 0


def _volume(batch: WarmUp) -> tuple[int, int]:
    return batch.rows * max(batch.size, 1), batch.rows


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
