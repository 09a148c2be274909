"""The one thread on which models run: it reads the batches from their own socket, runs them in
the order in which they were handed over, and answers them; between them the loader's warm-ups.

Where the device works beside this thread (streams.py) a second one waits for the device and
answers, so that a batch can be prepared while another one computes.

Answers come in the order of the batches, failures among them, and none is held back for the next
one: when a model ends this process, the agent suspects the first batch that has no answer.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

from services.worker.arena import Arena
from services.worker.engine.channel import BatchChannel
from services.worker.engine.executor import Executor
from services.worker.engine.failures import Diagnosis, Failed, diagnose
from services.worker.engine.memory import Device
from services.worker.engine.outbox import Outbox
from services.worker.engine.outputs import check_rows, named
from services.worker.engine.peaks import Peaks
from services.worker.engine.streams import Flight, Lanes, lanes_of
from services.worker.engine.tensors import Output, Value, read, room_for
from services.worker.engine.unrest import Unrest
from services.worker.wire import BatchFailed, BatchRan, ModelLoaded, RunBatch, TensorRef
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
    may_write: bool = True
    """It may write to what it has returned before, so its outputs leave before it runs again. And
    it may keep what it is given."""
    workspace_bytes: int = 0
    """The greatest peak that was measured."""

    takes_tensors: bool = field(init=False)
    """And nothing that the host would have to read first."""

    def __post_init__(self) -> None:
        self.takes_tensors = all(each.kind == "tensor" for each in self.executor.schema)


class _Ran(NamedTuple):
    outputs: tuple[TensorRef, ...]
    workspace_bytes: int


class _Departed(NamedTuple):
    """A batch whose outputs are on their way into the outbox, or why there are none."""

    batch: int
    flight: Flight
    outcome: _Ran | Diagnosis


class Dispatcher:
    """Owns the running of models. `residents` is written by the loader alone."""

    def __init__(
        self,
        device: Device,
        inbox: Arena,
        outbox: Outbox,
        channel: BatchChannel,
        lanes: Lanes | None = None,
    ) -> None:
        self.residents: Final[dict[ModelId, Resident]] = {}
        self.unrest: Final = Unrest()
        """Entered by the loader while it loads or evicts."""
        self._device = device
        self._inbox = inbox
        self._outbox = outbox
        self._channel = channel
        self._lanes = lanes or lanes_of(device, inbox, outbox.arena)
        self._peaks = Peaks(device, self.unrest, beside=self._lanes.asynchronous)
        self._work: Final[deque[RunBatch | Callable[[], None]]] = deque()
        self._departed: Final[queue.SimpleQueue[_Departed | None]] = queue.SimpleQueue()
        self._finishing = False

    # --- from other threads

    def call(self, function: Callable[[], T]) -> T:
        """Runs `function` on the dispatch thread after the batches that it has read, with none
        of them on the device any more, and returns its result. Raises what it raises."""
        future: Future[T] = Future()

        def run() -> None:
            self._lanes.wait()
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 — told to whoever asked
                future.set_exception(error)

        self._work.append(run)
        self._channel.wake()
        return future.result()

    def finish(self) -> None:
        """`serve` returns after what was handed over before."""
        self._finishing = True
        self._channel.wake()

    def serve_answers(self) -> None:
        """A second thread's: waits for the device and answers, until `serve` has returned; at
        once where no answer has to wait. Raises `DeviceLost`."""
        while self._lanes.asynchronous and (departed := self._departed.get()) is not None:
            self._land(*departed)

    # --- the dispatch thread

    def serve(self) -> None:
        """Until `finish`. Raises `DeviceLost`, and what the channel raises."""
        with self._device.running():
            while True:
                while self._work:
                    work = self._work.popleft()
                    if isinstance(work, RunBatch):
                        self._answer(work)
                    else:
                        work()
                    del work  # what it holds may be large, and the next may be long in coming
                finishing = self._finishing
                if not self._hear(wait=not finishing) and finishing:
                    break
            self._lanes.wait()
            self._departed.put(None)

    def _hear(self, *, wait: bool) -> bool:
        """Reads what the agent has sent; whether there was anything."""
        commands = self._channel.receive(wait=wait)
        for command in commands:
            if isinstance(command, RunBatch):
                self._work.append(command)
            else:
                self._outbox.release(command.batches)
        return bool(commands)

    def _answer(self, command: RunBatch) -> None:
        flight = self._lanes.flight()
        outcome = self._outcome(command, flight)
        if self._lanes.asynchronous:
            self._departed.put(_Departed(command.batch, flight, outcome))
        else:
            self._land(command.batch, flight, outcome)

    def _outcome(self, command: RunBatch, flight: Flight) -> _Ran | Diagnosis:
        try:
            return self._run(command, flight)
        except Exception as error:  # noqa: BLE001 — models raise anything
            why = diagnose(error)
        # Outside the except block: an error keeps alive what its frames hold.
        if why.code == "resource_exhausted":
            self._device.reclaim()  # before the next one runs, which may be before the answer
        return why

    def _run(self, command: RunBatch, flight: Flight) -> _Ran:
        # 1. The model, and the inputs where they lie.
        resident = self.residents.get(command.model)
        if resident is None:
            raise Failed("not_found", f"{command.model} is not loaded on this worker")
        inputs = [(ref.name, read(self._inbox, ref)) for ref in command.inputs]
        # 2. Run, measuring what is worth it.
        input_bytes = sum(ref.nbytes for ref in command.inputs)
        self._peaks.board(command.batch, input_bytes)
        worth_it = self._device.cheap_to_measure or input_bytes > resident.measured_input_bytes
        before = self._peaks.begin(command.batch) if worth_it else None
        if self._may_keep(resident):
            inputs = [(name, _copied(value)) for name, value in inputs]
        boarded = flight.board(inputs, move=resident.takes_tensors, settle=resident.may_write)
        outputs = self.outputs_of(resident.executor, resident.manifest, boarded, command.rows)
        flight.computed()
        nbytes = room_for(outputs)
        self._peaks.board(command.batch, input_bytes + nbytes)
        workspace_bytes = self._peaks.end(before) if before is not None else None
        if workspace_bytes is not None:
            resident.measured_input_bytes = max(resident.measured_input_bytes, input_bytes)
            resident.workspace_bytes = max(resident.workspace_bytes, workspace_bytes)
        # 3. Room in the outbox, which may have to wait for the agent, and the copy.
        while (offset := self._outbox.reserve(command.batch, nbytes)) is None:
            self._hear(wait=True)
        refs = flight.leave(self._outbox.arena, offset, outputs)
        return _Ran(refs, max(workspace_bytes or 0, 0))

    # --- where the answers are given

    def _land(self, batch: int, flight: Flight, outcome: _Ran | Diagnosis) -> None:
        """Raises `DeviceLost`."""
        seconds = 0.0
        if isinstance(outcome, _Ran):
            try:
                seconds = flight.seconds()
            except Exception as error:  # noqa: BLE001 — what the device did shows itself here
                outcome = diagnose(error)
        if isinstance(outcome, Diagnosis):
            self._fail(batch, outcome)
        else:
            self._channel.send(BatchRan(batch, outcome.outputs, seconds, outcome.workspace_bytes))
        self._peaks.land(batch, flight.end)
        if isinstance(outcome, Diagnosis):
            self._channel.wake()  # the dispatch thread may be waiting for this very room

    def _fail(self, batch: int, why: Diagnosis) -> None:
        """Answers, if the engine is fit for the next batch."""
        if not self._device.healthy():
            raise DeviceLost(why.message)
        # The device has come to rest: nobody writes to the outputs, or reads the inputs.
        self._outbox.release((batch,))
        self._channel.send(BatchFailed(batch, why.code, why.message))

    # --- what a batch is made of

    def _may_keep(self, resident: Resident) -> bool:
        """Its inputs beyond this batch, while other bytes come to lie where they are now. On
        their way to another device they are copied anyway."""
        writes = resident.manifest.stateful or resident.may_write
        return writes and self._device.torch_device.type == "cpu"

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
