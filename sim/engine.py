"""One engine in virtual time: the device runs batches, and beside it models come and go.

Batches run in their order, one at a time, for what was measured. Loads go by two lanes that
leave the device alone, as in services/worker/engine/loading.py: the *copier* (from the host's
memory, and from the disk for an architecture that is known) and the *grapher* (a program that
must be parsed first). What is only to be held in the host's memory is read while the copier has
nothing else to do, and a piece after each copy, so that it gets on however many swaps there are.
What concerns one model is done in its own order; evictions take no time.
Law: what it holds never exceeds its budgets; what would not fit fails to load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from services.worker.core.events import EvictModel, LoadModel, RunBatch
from services.worker.core.profile import BatchTimes
from services.worker.wire import BatchRan, LoadFailed, ModelEvicted, ModelLoaded
from shared.layout import aligned
from shared.models import Case
from shared.names import ModelId
from sim.agenda import Agenda
from sim.model import SimModel, SimWorker
from sim.settings import HANDOVER_S

Event = BatchRan | ModelLoaded | LoadFailed | ModelEvicted
_DUST_S = 1e-9
_PIECE_BYTES = 2 << 20
"""Read after each copy: `_STEP_BYTES` of services/worker/engine/blocks.py."""


class Lane:
    """Does one thing after the other."""

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda
        self._free_at = 0.0
        self._reserved_s = 0.0

    def take(self, seconds: float) -> float:
        """When something that takes so long, and begins as soon as it can, is over."""
        self._free_at = max(self._free_at, self._agenda.now + HANDOVER_S) + seconds
        self._reserved_s += seconds
        return self._free_at

    @property
    def busy_s(self) -> float:
        """Seconds of work done until now."""
        return self._reserved_s - max(self._free_at - self._agenda.now, 0.0)

    @property
    def idle_at(self) -> float:
        return max(self._free_at, self._agenda.now)


class _Hold:
    """A model on its way into the host's memory alone."""

    __slots__ = ("left_s", "model", "piece_s", "seconds")

    def __init__(self, model: SimModel, copy_speed: float) -> None:
        self.model = model
        # What comes after the read, on the way to the device, is not done yet.
        self.seconds = max(model.load_seconds - model.swap_seconds, _DUST_S) / copy_speed
        pieces = max(model.weights_bytes / _PIECE_BYTES, 1)
        self.piece_s = self.seconds / pieces
        self.left_s = self.seconds


class Engine:
    """One life of it: lost engines are forgotten as they are."""

    def __init__(
        self,
        agenda: Agenda,
        worker: SimWorker,
        models: Mapping[ModelId, SimModel],
        tell: Callable[[Event], None],
        random: np.random.Generator,
        service_cv: float = 0.0,
    ) -> None:
        self.busy_s = 0.0
        self.load_seconds = 0.0
        self.device: dict[ModelId, int] = {}
        """Bytes of the weights of what is there, or on its way."""
        self.host: dict[ModelId, int] = {}
        self._agenda = agenda
        self._worker = worker
        self._models = models
        self._tell_now = tell
        self._random = random
        self._sigma = float(np.sqrt(np.log1p(service_cv**2)))
        self._alive = True
        self._free_at = 0.0
        self._times: dict[ModelId, BatchTimes] = {}
        self._seconds: dict[tuple[ModelId, int], float] = {}
        self._copier, self._grapher = Lane(agenda), Lane(agenda)
        self._architectures: dict[str, float] = {}
        """When the program of each is ready."""
        self._loading: dict[ModelId, LoadModel] = {}
        self._deferred: list[LoadModel | EvictModel] = []
        self._holds: list[_Hold] = []
        """The first is being read."""
        self._marked = (0.0, 0.0)
        """Until when what was read of it is counted, and the copier's work by then."""
        self._looks = 0

    def __repr__(self) -> str:
        return f"<Engine {self._worker.name} {len(self.device)} on the device>"

    def end(self) -> None:
        """Nothing of it is heard any more."""
        self._alive = False

    def used_bytes(self) -> int:
        """On the device: as `shared.fit.used_bytes` counts it."""
        return self._sum(self.device)

    # --- batches ----------------------------------------------------------------------------

    def run(self, batch: RunBatch) -> None:
        assert batch.model in self.device, batch
        seconds = self.seconds(batch.model, batch.rows)
        if self._sigma:
            seconds *= float(self._random.lognormal(-(self._sigma**2) / 2, self._sigma))
        self._free_at = max(self._free_at, self._agenda.now + HANDOVER_S) + seconds
        self.busy_s += seconds
        self._tell(self._free_at + HANDOVER_S, BatchRan(batch.batch, (), seconds, 0))

    def seconds(self, model: ModelId, rows: int) -> float:
        """What a batch takes on this device."""
        known = self._seconds.get((model, rows))
        if known is None:
            times = self._times.get(model)
            if times is None:
                times = self._times[model] = BatchTimes(self._models[model].cases)
            known = self._seconds[model, rows] = times.estimate(rows) / self._worker.speed
        return known

    # --- models -----------------------------------------------------------------------------

    def submit(self, command: LoadModel | EvictModel) -> None:
        if self._must_wait(command):
            self._deferred.append(command)
            self._hurry(command.model)
        elif isinstance(command, EvictModel):
            (self.host if command.tier == "host" else self.device).pop(command.model, None)
            event = ModelEvicted(command.model, command.tier)
            self._tell(self._agenda.now + 2 * HANDOVER_S, event)
        else:
            self._load(command)

    def _must_wait(self, command: LoadModel | EvictModel) -> bool:
        load = self._loading.get(command.model)
        leaves = isinstance(command, EvictModel) and command.tier == "device"
        if load is not None and not (leaves and load.tier == "host"):
            return True
        return any(
            each.model == command.model
            or (isinstance(each, EvictModel) and isinstance(command, LoadModel))
            for each in self._deferred
        )

    def _load(self, command: LoadModel) -> None:
        model = self._models[command.model]
        nbytes = aligned(model.weights_bytes)
        source: Literal["disk", "host"] = "host" if model.id in self.host else "disk"
        # 1. Its room, which the core has made beforehand.
        self._loading[model.id] = command
        if command.keep_host or command.tier == "host":
            self.host[model.id] = nbytes
        if command.tier == "device":
            self.device[model.id] = nbytes
        if self._over():
            self.device.pop(model.id, None)
            self.host.pop(model.id, None)
            message = "no room on the device or in the host's memory"
            failed = LoadFailed(model.id, "resource_exhausted", message)
            self._agenda.after(HANDOVER_S, self._loaded, failed)
            return
        # 2. Its time.
        if command.tier == "host":
            self._read()
            self._holds.append(_Hold(model, self._worker.copy_speed))
            self._look_later()
            return
        speed = self._worker.copy_speed
        if source == "host":
            seconds = model.swap_seconds / speed
            end = self._copy(seconds)
        else:
            seconds = model.load_seconds / speed
            end = self._from_disk(model, seconds)
        self.load_seconds += seconds
        known = self._architectures.get(_architecture(model), end) < end
        event = ModelLoaded(
            model.id,
            (),
            nbytes,
            seconds,
            self._warmed(command),
            "device",
            source,
            "none" if not model.swap_seconds else "known" if known else "new",
        )
        self._agenda.at(end, self._loaded, event)

    def _from_disk(self, model: SimModel, seconds: float) -> float:
        """When it is there. Of one architecture the program is parsed once, and who comes
        meanwhile waits for it."""
        if not model.swap_seconds:
            return self._grapher.take(seconds)
        architecture = _architecture(model)
        ready_at = self._architectures.get(architecture)
        if ready_at is None:
            end = self._architectures[architecture] = self._grapher.take(seconds)
            return end
        if ready_at <= self._agenda.now:
            return self._copy(seconds)
        return max(self._copy(seconds), ready_at + seconds)

    def _copy(self, seconds: float) -> float:
        """When it is done. A piece of what is to be held is read after it."""
        end = self._copier.take(seconds)
        if self._holds:
            self._read()
            hold = self._holds[0]
            piece_s = min(hold.piece_s, max(hold.left_s, 0.0))
            hold.left_s -= piece_s
            self._copier.take(piece_s)
        return end

    def _read(self) -> None:
        """Counts what was read in the time that the copier left."""
        before, worked_before = self._marked
        self._marked = now, worked = self._agenda.now, self._copier.busy_s
        if self._holds:
            self._holds[0].left_s -= now - before - (worked - worked_before)

    def _hurry(self, model: ModelId) -> None:
        """Now somebody waits for it, if it is to be held."""
        for hold in self._holds[1:]:
            if hold.model.id == model:
                self._read()
                self._holds.remove(hold)
                self._holds.insert(0, hold)
                self._look_later()

    def _look_later(self) -> None:
        """When the first is read at the earliest."""
        self._looks += 1
        due = self._copier.idle_at + max(self._holds[0].left_s, 0.0)
        self._agenda.at(due, self._look, self._looks)

    def _look(self, number: int) -> None:
        if not self._alive or number != self._looks:
            return
        self._read()
        hold = self._holds[0]
        if hold.left_s <= _DUST_S:
            del self._holds[0]
            self.load_seconds += hold.seconds
            nbytes = aligned(hold.model.weights_bytes)
            held = ModelLoaded(hold.model.id, (), nbytes, hold.seconds, (), "host", "disk", "known")
            self._loaded(held)
        if self._holds:
            self._look_later()

    def _loaded(self, event: ModelLoaded | LoadFailed) -> None:
        """A load is over: what waited for it goes on."""
        if not self._alive:
            return
        del self._loading[event.model]
        self._tell(self._agenda.now + HANDOVER_S, event)
        deferred, self._deferred = self._deferred, []
        for command in deferred:
            self.submit(command)

    def _warmed(self, command: LoadModel) -> tuple[Case, ...]:
        """What the warm-up runs measure."""
        model = self._models[command.model]
        workspaces = {case.rows: case.workspace_bytes for case in model.cases}
        greatest = max(workspaces.values(), default=0)
        return tuple(
            Case(
                warm.rows,
                warm.size,
                self.seconds(model.id, warm.rows),
                workspaces.get(warm.rows, greatest),
            )
            for warm in command.warm
        )

    # --- parts ------------------------------------------------------------------------------

    def _over(self) -> bool:
        over_device = self._sum(self.device) > self._worker.budget_bytes
        return over_device or sum(self.host.values()) > self._worker.host_bytes

    def _sum(self, held: Mapping[ModelId, int]) -> int:
        workspaces = (case.workspace_bytes for m in held for case in self._models[m].cases)
        return sum(held.values()) + max(workspaces, default=0)

    def _tell(self, when: float, event: Event) -> None:
        self._agenda.at(when, self._heard, event)

    def _heard(self, event: Event) -> None:
        if self._alive:
            self._tell_now(event)


def _architecture(model: SimModel) -> str:
    return model.architecture or model.id
