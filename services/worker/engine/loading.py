"""How models come and go.

Two threads. The *copier* takes the commands in their order and owns what is resident:
evictions, copies into the host's memory, and models of an architecture that is known, which are
a copy as well. What takes long (a new architecture's program, a file that is loaded whole,
warm-ups) it hands to the *grapher* and goes on; what came of it returns to it. So no copy waits
for a parse, and an eviction that was ordered before a load is done before it.

Which commands wait for which is told in orders.py. Two things more may wait. Models that are
only to be held in the host's memory are read piece by piece, one piece after each other thing
that is done. And one architecture is parsed and warmed up once: loads of
it that come meanwhile are copies then.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from services.worker.engine import opening
from services.worker.engine.bare import Unshareable
from services.worker.engine.dispatch import DeviceLost, Dispatcher
from services.worker.engine.executor import Executor
from services.worker.engine.failures import Diagnosis, diagnose
from services.worker.engine.files import ScatteredFile
from services.worker.engine.grapher import Grapher
from services.worker.engine.holding import Holds
from services.worker.engine.memory import Device
from services.worker.engine.opening import Load, Program
from services.worker.engine.orders import Command, Orders
from services.worker.engine.programs import Skeleton, TorchScriptExecutor
from services.worker.engine.recovery import recover
from services.worker.engine.residency import Residency
from services.worker.engine.signature import merge
from services.worker.engine.warming import Warmer, Warmth
from services.worker.wire import (
    EvictModel,
    LoadFailed,
    LoadModel,
    MemoryMeasured,
    ModelEvicted,
    ModelLoaded,
)


class Loader:
    """The only writer of the dispatcher's `residents`."""

    def __init__(
        self,
        device: Device,
        budget_bytes: int,
        dispatcher: Dispatcher,
        send: Callable[[ModelLoaded | LoadFailed | ModelEvicted | MemoryMeasured], None],
        *,
        host_bytes: int = 0,
        share: bool = True,
    ) -> None:
        self._device = device
        self._residents = dispatcher.residents
        self._unrest = dispatcher.unrest
        self._send = send
        self._work: queue.SimpleQueue[Command | Callable[[], None] | None] = queue.SimpleQueue()
        self._residency: Residency[Load] = Residency(
            device, budget_bytes, host_bytes, self._unrest, dispatcher.call, share=share
        )
        self._grapher = Grapher(self._work.put)
        self._warmer = Warmer(device, dispatcher)
        self._orders = Orders()
        self._holds = Holds(self._residency)
        self._released: deque[Load] = deque()
        """Loads that waited for a program, and need not any more."""
        self._tidy_at: float | None = None
        """When there may be something to give back."""

    # --- from other threads

    def submit(self, command: Command) -> None:
        self._work.put(command)

    def finish(self) -> None:
        """`serve` returns after what is queued and what is under way."""
        self._work.put(None)

    def memory(self) -> MemoryMeasured:
        """As it is now."""
        return self._residency.memory()

    def serve_graphs(self) -> None:
        """The grapher's thread, until `serve` has returned. Raises `DeviceLost`."""
        with self._device.running():
            self._grapher.serve()

    # --- the copier's thread

    def serve(self) -> None:
        """Until `finish`. Raises `DeviceLost`."""
        finishing = False
        while not (finishing and self._orders.idle):
            # 1. What has waited longest, or else what is new.
            if self._released:
                self._attempt(self._released.popleft(), self._route)
            elif (command := self._orders.next()) is not None:
                self._take(command)
            else:
                finishing = not self._hear() or finishing
            # 2. A piece of what nobody waits for.
            if self._holds:
                self._attempt(self._holds.first, self._holds.step)
        self._grapher.finish()

    def _hear(self) -> bool:
        """Something new, if there is anything, or once it comes; False when it is the end."""
        work: Command | Callable[[], None] | None
        try:
            if self._holds:
                work = self._work.get_nowait()
            else:
                left = None if self._tidy_at is None else self._tidy_at - time.monotonic()
                work = self._work.get(timeout=None if left is None else max(left, 0))
        except queue.Empty:
            if not self._holds:
                self._tidy()
            return True
        if isinstance(work, Command):
            self._take(work)
        elif work is not None:
            work()
        return work is not None

    def _take(self, command: Command) -> None:
        if not self._orders.admit(command):
            self._holds.hurry(command.model)
        elif isinstance(command, EvictModel):
            self._evict(command)
        else:
            self._load(command)

    def _evict(self, command: EvictModel) -> None:
        if command.tier == "host":
            self._residency.release(command.model)
        elif (resident := self._residents.pop(command.model, None)) is not None:
            program = self._residency.program_of(command.model)
            if program is not None:  # its next model need not be measured again
                program.remember(resident.measured_input_bytes, resident.workspace_bytes)
            if self._residency.drop(command.model, resident.executor):
                with self._unrest:
                    self._device.reclaim()
        self._answer(ModelEvicted(command.model, command.tier))

    def _answer(self, event: ModelLoaded | LoadFailed | ModelEvicted) -> None:
        """With what is true of the memory by then."""
        self._send(self.memory())
        self._send(event)
        self._tidy_at = time.monotonic()

    def _tidy(self) -> None:
        before = self._residency.held()
        self._tidy_at = self._residency.tidy(time.monotonic())
        if self._residency.held() != before:
            self._send(self.memory())

    # --- how a load begins

    def _load(self, command: LoadModel) -> None:
        known = self._residents.get(command.model)
        if known is not None and command.tier == "device":
            self._answer(known.loaded)
            return
        file, program = ScatteredFile(command.file), None
        if command.layout is not None and opening.has_program(command):
            program = self._residency.programs.of(command.layout.architecture)
        load = Load(command, file, time.perf_counter(), program)
        self._orders.begin(command)
        if command.tier == "host":
            self._holds.add(load)
            return
        if load.shared is not None:
            load.architecture = "known" if load.shared.ready else "new"
        self._attempt(load, self._route)

    def _route(self, load: Load) -> ModelLoaded | None:
        program = load.shared
        if program is None:
            load.architecture = "none"
            self._residency.take_room(load.model, opening.estimate(load))
            self._grapher.submit(partial(self._open, load), partial(self._opened, load))
        elif program.keeps_waiting(load.asked):
            program.waiting.append(load)
        elif program.skeleton is None:
            program.preparing = load
            self._grapher.submit(partial(self._parse, load), partial(self._parsed, load))
        else:
            return self._place(load, program.skeleton)
        return None

    def _place(self, load: Load, skeleton: Skeleton) -> ModelLoaded | None:
        """A program that is there: copy the weights, and point at them."""
        program, manifest = load.shared, load.manifest
        assert program is not None
        load.inputs = merge(skeleton.schema, manifest.inputs)
        self._residency.leave(self._workspace_bytes(program))
        placed = self._residency.place(
            load.model, program, load.layout, load.file, keep_host=load.command.keep_host
        )
        try:
            load.executor = TorchScriptExecutor(
                skeleton, placed.weights, manifest, self._device.torch_device
            )
        except Unshareable:  # the layout was not true of this file
            load.alone = True
        if load.alone:
            del placed
            self._residency.drop(load.model, None)
            self._residency.release(load.model)
            return self._route(load)
        load.weights_bytes = placed.weights_bytes + program.constants_bytes
        load.source = placed.source
        if program.knows(load.asked):
            return self._commit(load, Warmth(program.cases, program.measured_input_bytes))
        if program.preparing is None:
            program.preparing = load
        self._warm_up(load)
        return None

    def _workspace_bytes(self, program: Program) -> int:
        """The greatest of all that may run, the program's next model included."""
        residents = (each.workspace_bytes for each in self._residents.values())
        return max(program.workspace_bytes, *residents, 0)

    def _admit(self, load: Load) -> ModelLoaded | None:
        """A module of its own: asks again whether there is room, for what it really takes."""
        assert load.executor is not None
        load.weights_bytes = load.executor.weights_bytes(self._device.granule)
        self._residency.take_room(load.model, load.weights_bytes)
        load.inputs = merge(load.executor.schema, load.manifest.inputs)
        if not load.asked:
            return self._commit(load, Warmth({}, 0))
        self._warm_up(load)
        return None

    # --- what takes long, on the grapher's thread

    def _parse(self, load: Load) -> Skeleton | Unshareable:
        with self._unrest:
            return opening.parse(load, self._device)

    def _open(self, load: Load) -> Executor:
        with self._unrest:
            return opening.open_whole(load, self._device)

    def _warm_up(self, load: Load) -> None:
        """Of what is asked, that which no other model of the program has run."""
        assert load.executor is not None
        program = load.shared
        fresh = program is None or not program.served
        known = {} if program is None else program.cases
        batches = {key: batch for key, batch in load.asked.items() if key not in known}
        work = partial(self._warmer.warm_up, load.executor, load.manifest, batches, fresh=fresh)
        self._grapher.submit(work, partial(self._warmed, load))

    # --- what came of it

    def _parsed(self, load: Load, result: Skeleton | Unshareable | Diagnosis) -> None:
        assert load.program is not None
        if isinstance(result, Diagnosis):
            self._fail(load, result)
        elif isinstance(result, Unshareable):
            load.program.unshareable = str(result)
            # Held for nothing; those that are being read see it for themselves.
            for model in load.program.models - self._holds.models:
                self._residency.release(model)
            self._attempt(load, self._route)
            self._prepared(load)
        else:
            self._residency.know(load.program, result)
            self._attempt(load, partial(self._place, skeleton=result))

    def _opened(self, load: Load, result: Executor | Diagnosis) -> None:
        if isinstance(result, Diagnosis):
            self._fail(load, result)
            return
        load.executor = result
        self._attempt(load, self._admit)

    def _warmed(self, load: Load, result: Warmth | Diagnosis) -> None:
        if isinstance(result, Diagnosis):
            self._fail(load, result)
            return
        if (program := load.shared) is not None:
            program.learn(*result)
            result = Warmth(program.cases, program.measured_input_bytes)
        self._attempt(load, partial(self._commit, warmth=result))

    # --- how a load ends

    def _attempt(self, load: Load, step: Callable[[Load], ModelLoaded | None]) -> None:
        """A step of a load, which is over if there is an answer."""
        try:
            event = step(load)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 — files raise anything
            why = diagnose(error)
        else:
            if event is not None:
                self._end(load, event)
            return
        # Outside the except block: an error keeps alive what its frames hold.
        self._fail(load, why)

    def _commit(self, load: Load, warmth: Warmth) -> ModelLoaded:
        """The last thing that may fail; from here on batches find it."""
        resident = opening.on_device(load, *warmth)
        if load.shared is not None:
            load.shared.served = True
        self._residents[load.model] = resident
        return resident.loaded

    def _fail(self, load: Load, why: Diagnosis) -> None:
        """What was held before stays; a hold has undone itself."""
        if load.command.tier == "device":
            self._residency.drop(load.model, load.executor)
        recover(self._device, why)
        self._end(load, LoadFailed(load.model, why.code, why.message))

    def _end(self, load: Load, event: ModelLoaded | LoadFailed) -> None:
        """Answers, and lets those go on that waited for it."""
        load.file.close()
        load.executor = load.steps = None
        self._holds.remove(load)
        self._answer(event)
        self._orders.end(load.model)
        self._prepared(load)

    def _prepared(self, load: Load) -> None:
        """The program that this load had prepared is ready, or each file has its own; or this
        load failed, and the next one prepares it."""
        program = load.program
        if program is not None and program.preparing is load:
            program.preparing = None
            self._released += program.waiting
            program.waiting = []
