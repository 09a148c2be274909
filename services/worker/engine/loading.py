"""How models come and go.

Two threads. The *copier* takes the commands in their order and owns what is resident:
evictions, copies into the host's memory, and models of an architecture that is known, which are
a copy as well. What takes long (a new architecture's program, a file that is loaded whole,
warm-ups) it hands to the *grapher* and goes on; what came of it returns to it. So no copy waits
for a parse, and an eviction that was ordered before a load is done before it.

Commands about a model whose load is under way wait until that has ended. One architecture is
parsed and warmed up once: loads of it that come meanwhile wait as well, and are copies then.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from services.worker.engine import opening
from services.worker.engine.bare import Unshareable
from services.worker.engine.dispatch import DeviceLost, Dispatcher, Resident
from services.worker.engine.executor import Executor
from services.worker.engine.failures import Diagnosis, diagnose
from services.worker.engine.files import ScatteredFile
from services.worker.engine.grapher import Grapher, recover
from services.worker.engine.memory import Device
from services.worker.engine.opening import Load, Program
from services.worker.engine.programs import Skeleton, TorchScriptExecutor
from services.worker.engine.residency import Residency
from services.worker.engine.signature import merge
from services.worker.engine.warming import Moves, Warmer, Warmth, may_be_warmed
from services.worker.wire import (
    EvictModel,
    LoadFailed,
    LoadModel,
    MemoryMeasured,
    ModelEvicted,
    ModelLoaded,
)
from shared.names import ModelId

Command = LoadModel | EvictModel
_COLD: Final = Warmth((), 0)


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
        self._send = send
        self._work: queue.SimpleQueue[Command | Callable[[], None] | None] = queue.SimpleQueue()
        self._moves = Moves(dispatcher.memory_moves)
        self._residency: Residency[Load] = Residency(
            device, budget_bytes, host_bytes, self._moves, share=share
        )
        self._grapher = Grapher(device, self._work.put)
        self._warmer = Warmer(device, dispatcher, self._moves)
        self._under_way: set[ModelId] = set()
        self._deferred: list[Command] = []
        self._tidy_in_s: float | None = None

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
        self._grapher.serve()

    # --- the copier's thread

    def serve(self) -> None:
        """Until `finish`. Raises `DeviceLost`."""
        finishing = False
        while not finishing or self._under_way:
            try:
                work = self._work.get(timeout=self._tidy_in_s)
            except queue.Empty:
                self._tidy()
                continue
            if work is None:
                finishing = True
            elif isinstance(work, Command):
                self._take(work)
            else:
                work()
            del work  # it may hold a model that is evicted before the next one comes
        self._grapher.finish()

    def _take(self, command: Command) -> None:
        if self._must_wait(command):
            self._deferred.append(command)
        elif isinstance(command, EvictModel):
            self._evict(command)
        else:
            self._load(command)

    def _must_wait(self, command: Command) -> bool:
        """For a load of the same model, or for an eviction that makes the room."""
        return command.model in self._under_way or any(
            each.model == command.model
            or (isinstance(each, EvictModel) and isinstance(command, LoadModel))
            for each in self._deferred
        )

    def _evict(self, command: EvictModel) -> None:
        if command.tier == "host":
            self._residency.release(command.model)
        elif (resident := self._residents.pop(command.model, None)) is not None:
            self._remember(command.model, resident)
            self._residency.drop(command.model, resident.executor)
        self._answer(ModelEvicted(command.model, command.tier))
        self._tidy()

    def _remember(self, model: ModelId, resident: Resident) -> None:
        """So that the next model of its architecture need not be measured again."""
        program = self._residency.program_of(model)
        if program is not None:
            program.measured_input_bytes = max(
                program.measured_input_bytes, resident.measured_input_bytes
            )
            program.workspace_bytes = max(program.workspace_bytes, resident.workspace_bytes)

    def _answer(self, event: ModelLoaded | LoadFailed | ModelEvicted) -> None:
        """With what is true of the memory by then."""
        self._send(self.memory())
        self._send(event)

    def _tidy(self) -> None:
        before = self._residency.held()
        now = time.monotonic()
        again = self._residency.tidy(now)
        self._tidy_in_s = None if again is None else max(again - now, 0)
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
        if load.shared is not None:
            load.architecture = "known" if load.shared.ready else "new"
        self._under_way.add(load.model)
        self._attempt(load, self._route)

    def _route(self, load: Load) -> None:
        program = load.shared
        if load.command.tier == "host":
            self._hold(load)
        elif program is None:
            load.architecture = "none"
            self._residency.take_room(load.model, opening.estimate(load))
            self._grapher.submit(partial(self._open, load), partial(self._opened, load))
        elif program.preparing is not None:
            program.waiting.append(load)
        elif program.skeleton is None:
            program.preparing = load
            self._grapher.submit(partial(self._parse, load), partial(self._parsed, load))
        else:
            self._place(load, program.skeleton)

    def _workspace_bytes(self, program: Program) -> int:
        """The greatest of all that may run, the program's next model included."""
        residents = (each.workspace_bytes for each in self._residents.values())
        return max(program.workspace_bytes, *residents, 0)

    def _hold(self, load: Load) -> None:
        """A model that needs a module of its own keeps nothing in the host's memory: it comes
        from the disk each time, and says so by its zero bytes."""
        nbytes = 0
        if load.shared is not None:
            self._residency.hold(load.model, load.shared, load.layout, load.file)
            nbytes = load.layout.weights_bytes
        seconds = time.perf_counter() - load.started
        self._end(load, ModelLoaded(load.model, (), nbytes, seconds, tier="host"))

    def _place(self, load: Load, skeleton: Skeleton) -> None:
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
                skeleton, placed.views, manifest, self._device.torch_device
            )
        except Unshareable:  # the layout was not true of this file
            load.alone = True
        if load.alone:
            del placed
            self._residency.drop(load.model, None)
            self._residency.release(load.model)
            self._route(load)
            return
        load.weights_bytes = placed.weights_bytes + program.constants_bytes
        load.source = placed.source
        if program.warmed or not self._wants_warmth(load):
            self._loaded(load, Warmth(program.cases, program.measured_input_bytes))
        else:
            program.preparing = load
            self._warm_up(load)

    # --- what takes long, on the grapher's thread

    def _parse(self, load: Load) -> Skeleton | Unshareable:
        with self._moves:
            return opening.parse(load, self._device)

    def _open(self, load: Load) -> Executor:
        with self._moves:
            return opening.open_whole(load, self._device)

    def _warm_up(self, load: Load) -> None:
        assert load.executor is not None
        work = partial(self._warmer.warm_up, load.executor, load.manifest, load.command.warm)
        self._grapher.submit(work, partial(self._warmed, load))

    def _wants_warmth(self, load: Load) -> bool:
        return bool(load.command.warm) and may_be_warmed(load.manifest)

    # --- what came of it

    def _parsed(self, load: Load, result: Skeleton | Unshareable | Diagnosis) -> None:
        assert load.program is not None
        if isinstance(result, Diagnosis):
            self._fail(load, result)
        elif isinstance(result, Unshareable):
            load.program.unshareable = str(result)
            for model in tuple(load.program.models):  # held for nothing
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

    def _admit(self, load: Load) -> None:
        """Asks again whether there is room, for what the module really takes."""
        assert load.executor is not None
        load.weights_bytes = load.executor.weights_bytes(self._device.granule)
        self._residency.take_room(load.model, load.weights_bytes)
        load.inputs = merge(load.executor.schema, load.manifest.inputs)
        if self._wants_warmth(load):
            self._warm_up(load)
        else:
            self._loaded(load, _COLD)

    def _warmed(self, load: Load, result: Warmth | Diagnosis) -> None:
        if isinstance(result, Diagnosis):
            self._fail(load, result)
            return
        if load.shared is not None:
            load.shared.warmed = True
            load.shared.cases, load.shared.measured_input_bytes = result
        self._loaded(load, result)

    # --- how a load ends

    def _loaded(self, load: Load, warmth: Warmth) -> None:
        """From here on batches find it."""
        assert load.executor is not None
        event = ModelLoaded(
            load.model,
            load.inputs,
            load.weights_bytes,
            time.perf_counter() - load.started,
            warmth.cases,
            source=load.source,
            architecture=load.architecture,
        )
        layout = load.command.layout
        self._residents[load.model] = Resident(
            load.executor,
            load.manifest,
            event,
            warmth.input_bytes,
            may_write=load.shared is None and (layout is None or layout.may_write),
            workspace_bytes=max(
                load.shared.workspace_bytes if load.shared is not None else 0,
                *(case.workspace_bytes for case in warmth.cases),
                0,
            ),
        )
        self._end(load, event)

    def _attempt(self, load: Load, step: Callable[[Load], None]) -> None:
        try:
            step(load)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 — files raise anything
            why = diagnose(error)
        else:
            return
        # Outside the except block: an error keeps alive what its frames hold.
        self._fail(load, why)

    def _fail(self, load: Load, why: Diagnosis) -> None:
        self._residency.drop(load.model, load.executor)
        recover(self._device, why)
        self._end(load, LoadFailed(load.model, why.code, why.message))

    def _end(self, load: Load, event: ModelLoaded | LoadFailed) -> None:
        """Answers, and lets those go on that waited for it."""
        load.file.close()
        load.executor = None
        self._under_way.discard(load.model)
        self._answer(event)
        self._prepared(load)
        deferred, self._deferred = self._deferred, []
        for command in deferred:
            self._take(command)
        self._tidy()

    def _prepared(self, load: Load) -> None:
        """The program that this load had prepared is ready, or each file has its own; or this
        load failed, and the next one prepares it."""
        program = load.program
        if program is None or program.preparing is not load:
            return
        program.preparing = None
        waiting, program.waiting = program.waiting, []
        for each in waiting:
            self._attempt(each, self._route)
