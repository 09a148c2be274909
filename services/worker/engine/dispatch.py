"""The one thread on which models run: batches in the order in which they were handed over, and
between them the loader's warm-ups."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, TypeVar

from services.worker.arena import Arena
from services.worker.engine.executor import Executor
from services.worker.engine.failures import Diagnosis, Failed, diagnose
from services.worker.engine.memory import Device
from services.worker.engine.outbox import Outbox
from services.worker.engine.outputs import check_rows, named
from services.worker.engine.tensors import Output, Value, read, room_for, write
from services.worker.wire import BatchFailed, BatchRan, ModelLoaded, RunBatch
from shared.models import Manifest
from shared.names import ModelId

T = TypeVar("T")


class DeviceLost(Exception):
    """The device's context is corrupted: no model of this process can run any more."""


@dataclass
class Resident:
    """A model on the device."""

    executor: Executor
    manifest: Manifest
    loaded: ModelLoaded
    measured_input_bytes: int = 0
    """Inputs of the greatest batch whose workspace was measured."""


class Dispatcher:
    """Owns the running of models. `residents` is written by the loader alone."""

    def __init__(
        self,
        device: Device,
        inbox: Arena,
        outbox: Outbox,
        send: Callable[[BatchRan | BatchFailed], None],
    ) -> None:
        self.residents: Final[dict[ModelId, Resident]] = {}
        self.memory_moves: Final = threading.Event()
        """Set by the loader while it loads or evicts: a peak measured then tells nothing."""
        self._device = device
        self._inbox = inbox
        self._outbox = outbox
        self._send = send
        self._work: queue.SimpleQueue[RunBatch | Callable[[], None] | None] = queue.SimpleQueue()

    # --- from other threads

    def submit(self, command: RunBatch) -> None:
        self._work.put(command)

    def call(self, function: Callable[[], T]) -> T:
        """Runs `function`, which raises nothing, on the dispatch thread after what is queued,
        and returns its result."""
        future: Future[T] = Future()
        self._work.put(lambda: future.set_result(function()))
        return future.result()

    def finish(self) -> None:
        """`serve` returns after what is queued."""
        self._work.put(None)

    # --- the dispatch thread

    def serve(self) -> None:
        """Until `finish`. Raises `DeviceLost`."""
        with self._device.running():
            while (work := self._work.get()) is not None:
                if isinstance(work, RunBatch):
                    self._answer(work)
                else:
                    work()

    def _answer(self, command: RunBatch) -> None:
        try:
            event = self._run(command)
        except Exception as error:  # noqa: BLE001 — models raise anything
            why = diagnose(error)
        else:
            self._send(event)
            return
        # Outside the except block: an error keeps alive what its frames hold.
        self._send(self._recover(command, why))

    def _run(self, command: RunBatch) -> BatchRan:
        # 1. The model, and the inputs where they lie.
        started = time.perf_counter()
        resident = self.residents.get(command.model)
        if resident is None:
            raise Failed("not_found", f"{command.model} is not loaded on this worker")
        inputs = [(ref.name, read(self._inbox, ref)) for ref in command.inputs]
        if resident.manifest.stateful:  # it may keep what it is given beyond this batch
            inputs = [(name, _copied(value)) for name, value in inputs]
        # 2. Run, measuring what is worth it.
        input_bytes = sum(ref.nbytes for ref in command.inputs)
        measured = self._worth_measuring(resident, input_bytes)
        if measured:
            self._device.begin_measuring()
        outputs = self.outputs_of(resident.executor, resident.manifest, inputs, command.rows)
        computed = time.perf_counter() - started
        workspace = self._device.peak_bytes() if measured else 0
        if self.memory_moves.is_set():
            workspace = 0
        elif measured:
            resident.measured_input_bytes = max(resident.measured_input_bytes, input_bytes)
        # 3. Room in the outbox, which may have to wait for the agent, and the copy.
        offset = self._outbox.reserve(command.batch, room_for(outputs))
        copying = time.perf_counter()
        refs = write(self._outbox.arena, offset, outputs)
        self._device.synchronize()
        seconds = computed + time.perf_counter() - copying
        return BatchRan(command.batch, refs, seconds, workspace)

    def _recover(self, command: RunBatch, why: Diagnosis) -> BatchFailed:
        """Makes the engine fit for the next batch. Raises `DeviceLost` when it cannot be."""
        self._outbox.release((command.batch,))
        if why.code == "resource_exhausted":
            self._device.reclaim()
        if not self._device.healthy():
            raise DeviceLost(why.message)
        return BatchFailed(command.batch, why.code, why.message)

    def _worth_measuring(self, resident: Resident, input_bytes: int) -> bool:
        if self.memory_moves.is_set():
            return False
        return self._device.cheap_to_measure or input_bytes > resident.measured_input_bytes

    def outputs_of(
        self,
        executor: Executor,
        manifest: Manifest,
        inputs: Sequence[tuple[str, Value]],
        rows: int,
    ) -> list[Output]:
        """What the model makes of the inputs, on its device. Only on the dispatch thread."""
        outputs = named(executor.run(inputs), manifest.outputs)
        if manifest.max_batch_size and rows:
            check_rows(outputs, rows)
        return outputs


def _copied(value: Value) -> Value:
    return value if isinstance(value, list) else value.clone()
