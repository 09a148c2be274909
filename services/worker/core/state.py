"""Which models are on the device, and which come and go: the lifecycle, and the room.

    absent → fetching → absent, with a manifest → loading → ready → evicting → absent

Laws (`validate()` recomputes them):
- What is loading, ready or evicting fits the budget together, unless a measurement found a
  model larger than was believed (`overrun`); then nothing is loaded until it fits again.
- At most `max_loading` models are loading. Only fetched models load.
- Only a model that is not wanted, has no consumer and no unanswered item is evicted; the least
  recently used goes first, and nothing is evicted unless that makes the room that is needed.
- A wanted model that is neither ready nor on its way has an `error` that says why, with numbers.
- A model that killed engines too often is not loaded again until its file is another one.
- Known is only what is wanted, fetched, on the device, consumed, held, or has killed an engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from services.worker.core.events import (
    Action,
    EvictModel,
    FetchModel,
    LoadFailed,
    LoadModel,
    ModelFetched,
    ModelLoaded,
    TellPlacer,
)
from services.worker.core.profile import Measured
from shared.control import ModelReport, Phase
from shared.fit import Refusal, fit, used_bytes
from shared.models import Footprint, Manifest
from shared.names import ModelId

Stage = Literal["absent", "fetching", "loading", "ready", "evicting"]
_RESIDENT = ("loading", "ready", "evicting")
_RETRY_S = 2.0
_RETRY_CAP_S = 300.0
MAX_DEATHS = 2
"""Engines that one load, or one item, may kill before it is kept from them."""
MAX_BURIED = 2
"""Buried items of one model before it is kept from engines itself. One may be the request's own
fault; at two it is the model's, and each has cost all its neighbours two reloads."""


@dataclass(slots=True)
class Model:
    """One model as this worker knows it. Its counters only grow, until it is forgotten."""

    id: ModelId
    stage: Stage = "absent"
    manifest: Manifest | None = None
    digest: str = ""
    """Of the file that everything below was seen of; it outlasts the manifest."""
    measured: Measured = field(default_factory=lambda: Measured(0, None))
    error: str | None = None
    failures: int = 0
    retry_at: float = 0.0
    load_began: float = 0.0
    load_deaths: int = 0
    buried: int = 0
    """Items that were buried, having killed engines."""
    suspect: bool = False
    """An engine died while it was loading: it loads with nothing beside it."""
    consumers: int = 0
    unanswered: int = 0
    held: int = 0
    arrived: int = 0
    answered: int = 0
    busy_s: float = 0.0
    last_used: float = 0.0

    @property
    def footprint(self) -> Footprint:
        return self.measured.footprint

    @property
    def resident(self) -> bool:
        return self.stage in _RESIDENT

    @property
    def quarantined(self) -> str | None:
        """Why it is kept from engines, however often it is assigned."""
        if self.load_deaths >= MAX_DEATHS:
            return f"quarantined: it ended {self.load_deaths} engines as it was loaded"
        if self.buried >= MAX_BURIED:
            return f"quarantined: {self.buried} of its requests ended {MAX_DEATHS} engines each"
        return None


class WorkerState:
    """The models of one worker against its budget."""

    def __init__(self, *, max_loading: int = 1) -> None:
        self.max_loading = max_loading
        self.budget_bytes = 0
        self.device_kind = ""
        self.engine_up = False
        self.overrun = False
        self.quiesce = False
        """A suspect load waits for the device to be quiet: no further batch should begin."""
        self.condemned = False
        """The engine hangs and is about to be killed: nothing is begun on it, or it would be
        taken for what hung."""
        self.wanted: dict[ModelId, None] = {}
        self.models: dict[ModelId, Model] = {}
        self._resident: dict[ModelId, Model] = {}

    def __repr__(self) -> str:
        stages: list[str] = [m.stage for m in self.models.values()]
        told = ", ".join(f"{stages.count(s)} {s}" for s in ("ready", *_RESIDENT[::2], "fetching"))
        return (
            f"WorkerState({len(self.wanted)} wanted, {told}, "
            f"{self.used_bytes():,} of {self.budget_bytes:,} bytes)"
        )

    # --- questions ------------------------------------------------------------------------

    def get(self, model: ModelId) -> Model:
        known = self.models.get(model)
        if known is None:
            known = self.models[model] = Model(model)
        return known

    def residents(self) -> list[Model]:
        return list(self._resident.values())

    def used_bytes(self) -> int:
        return used_bytes(model.footprint for model in self.residents())

    def is_ready(self, model: ModelId) -> bool:
        known = self.models.get(model)
        return known is not None and known.stage == "ready"

    def loading(self) -> list[Model]:
        return [model for model in self._resident.values() if model.stage == "loading"]

    def idle(self) -> list[Model]:
        """What may be evicted, least recently used first."""
        return sorted((m for m in self.residents() if self._evictable(m)), key=_last_used)

    # --- facts ----------------------------------------------------------------------------

    def assigned(self, models: Iterable[ModelId], now: float) -> None:
        before = self.wanted
        self.wanted = dict.fromkeys(models)
        for name in self.wanted.keys() - before.keys():
            model = self.get(name)
            model.error, model.failures, model.retry_at = model.quarantined, 0, now
            if model.stage == "absent":
                model.manifest = None  # it may have been registered anew since
        for name in before.keys() - self.wanted.keys():
            self.get(name).error = None

    def engine_started(self, budget_bytes: int, device_kind: str) -> None:
        self.engine_up = True
        self.condemned = False
        self.budget_bytes = budget_bytes
        self.device_kind = device_kind

    def engine_lost(self, *, batch_running: bool) -> list[Action]:
        """Nothing is on the device any more. A load under way is a suspect; it is guilty
        when no batch ran beside it."""
        self.engine_up = self.overrun = self.quiesce = self.condemned = False
        actions: list[Action] = []
        for model in self.residents():
            if model.stage == "loading":
                model.suspect = True
                model.load_deaths += not batch_running
                actions += self._judge(model)
            self._move(model, "absent")
        return actions

    def buried(self, name: ModelId) -> list[Action]:
        """One of its items killed as many engines as one may."""
        model = self.get(name)
        model.buried += 1
        return self._judge(model)

    def fetched(self, fact: ModelFetched) -> None:
        model = self.get(fact.model)
        if model.stage != "fetching":
            return
        self._move(model, "absent")
        model.manifest = fact.manifest
        anew = model.digest != fact.manifest.digest
        if anew:
            model.digest = fact.manifest.digest
            model.load_deaths, model.buried, model.suspect = 0, 0, False
        if anew or not model.measured.loaded:
            model.measured = Measured(fact.manifest.size_bytes, fact.profile)
        model.error = model.quarantined

    def fetch_failed(self, name: ModelId, message: str, now: float) -> list[Action]:
        model = self.get(name)
        if model.stage != "fetching":
            return []
        self._move(model, "absent")
        return self._failed(model, message, now)

    def loaded(self, fact: ModelLoaded) -> None:
        model = self.get(fact.model)
        if model.stage != "loading":
            return
        self._move(model, "ready")
        model.error, model.failures = None, 0
        model.suspect, model.load_deaths = False, 0
        model.measured.load(
            fact.weights_bytes, fact.workspace_bytes, fact.batch_seconds, fact.load_seconds
        )
        self.overrun = self.overrun or self.used_bytes() > self.budget_bytes

    def load_failed(self, fact: LoadFailed, now: float) -> list[Action]:
        model = self.get(fact.model)
        if model.stage != "loading":
            return []
        self._move(model, "absent")
        actions = self._failed(model, fact.message, now)
        if fact.code == "resource_exhausted" and (idle := self.idle()):
            # The device has less room than the sum says: make some before trying again.
            actions.append(self._evict(idle[0]))
        return actions

    def evicted(self, name: ModelId) -> None:
        model = self.get(name)
        if model.stage == "evicting":
            self._move(model, "absent")
        self.overrun = self.overrun and self.used_bytes() > self.budget_bytes

    def lost_model(self, name: ModelId) -> None:
        """The engine says that it does not have it."""
        model = self.get(name)
        if model.stage == "ready":
            self._move(model, "absent")

    def workspace_grew(self) -> None:
        self.overrun = self.overrun or self.used_bytes() > self.budget_bytes

    # --- decisions ------------------------------------------------------------------------

    def reconcile(self, now: float, *, batches_running: bool, may_load: bool) -> list[Action]:
        """Towards having every wanted model on the device. Called after whatever changed it,
        and at `next_retry`."""
        if not self.engine_up or self.condemned:
            return []
        actions: list[Action] = []
        self.quiesce = False
        # 1. What is wanted and not known is fetched, whatever the room: that costs no device.
        for model in self._waiting(now):
            if model.manifest is None:
                self._move(model, "fetching")
                actions.append(FetchModel(model.id))
        # 2. What was measured too large gives way first.
        if self.overrun:
            actions += self._shrink()
        # 3. Then the wanted ones come in, in the placer's order, as there is room.
        for model in self._waiting(now):
            if not may_load or self.overrun or len(self.loading()) >= self.max_loading:
                break
            refusal, evictions = self._room_for(model)
            actions += evictions
            if refusal is None and not evictions:
                if model.suspect and (batches_running or self.loading()):
                    self.quiesce = True
                    break
                actions.append(self._load(model, now))
            elif refusal is None or refusal.reason == _COMING:
                break  # its room is on the way: nobody behind it takes that
            elif model.error != str(refusal):
                model.error = str(refusal)
                actions.append(TellPlacer(f"{model.id}: {refusal}"))
        return actions

    def next_retry(self, now: float) -> float | None:
        """When a failed model is tried again."""
        times = [m.retry_at for m in map(self.get, self.wanted) if m.stage == "absent"]
        return min((at for at in times if at > now), default=None)

    def load_due(self, timeout_s: float) -> tuple[float, str] | None:
        """When the oldest load under way has taken too long, and what is to be said then."""
        oldest = min(self.loading(), key=lambda model: model.load_began, default=None)
        if oldest is None:
            return None
        return oldest.load_began + timeout_s, f"{oldest.id} was loading for {timeout_s:g} s"

    def forget(self) -> list[ModelId]:
        """Drops the models that nothing hangs on any more."""
        gone = [model.id for model in self.models.values() if self._forgettable(model)]
        for name in gone:
            del self.models[name]
        return gone

    def _move(self, model: Model, stage: Stage) -> None:
        model.stage = stage
        if model.resident:
            self._resident[model.id] = model
        else:
            self._resident.pop(model.id, None)

    def _waiting(self, now: float) -> list[Model]:
        models = map(self.get, self.wanted)
        return [
            m
            for m in models
            if m.stage == "absent"
            and m.retry_at <= now
            # What is quarantined is fetched, once per assignment: the file may be another one.
            and (m.manifest is None or not m.quarantined)
        ]

    def _forgettable(self, model: Model) -> bool:
        return (
            model.stage == "absent"
            and model.id not in self.wanted
            and not model.consumers
            and not model.held
            and not (model.load_deaths or model.buried or model.suspect)
        )

    def _evictable(self, model: Model) -> bool:
        return (
            model.stage == "ready"
            and model.id not in self.wanted
            and not model.consumers
            and not model.unanswered
        )

    def _room_for(self, model: Model) -> tuple[Refusal | None, list[Action]]:
        """(None, []): there is room. (None, evictions): these make it. Else why not, or that
        it comes by itself."""
        budget = self.budget_bytes
        staying = self.residents()
        if fit(model.footprint, _footprints(staying), budget) is None:
            return None, []
        staying = [m for m in staying if m.stage != "evicting"]
        if fit(model.footprint, _footprints(staying), budget) is None:
            return Refusal(_COMING), []
        victims: list[Model] = []
        for victim in self.idle():
            staying.remove(victim)
            victims.append(victim)
            if fit(model.footprint, _footprints(staying), budget) is None:
                for spared in victims[-2::-1]:  # whoever need not go after all, stays
                    if fit(model.footprint, _footprints([*staying, spared]), budget) is None:
                        staying.append(spared)
                        victims.remove(spared)
                return None, [self._evict(victim) for victim in victims]
        refusal = fit(model.footprint, _footprints(staying), budget)
        kept = [m for m in staying if m.id in self.wanted]
        if fit(model.footprint, _footprints(kept), budget) is None:
            return Refusal(_COMING), []  # what is unbound now still finishes its items
        return refusal, []

    def _shrink(self) -> list[Action]:
        """Evicts idle models until the rest fits; a wanted one that does not even then, and
        has no consumer yet, goes itself and says so."""
        actions: list[Action] = []
        staying = [m for m in self.residents() if m.stage != "evicting"]
        fresh = [m for m in staying if m.stage == "ready" and not m.consumers and not m.unanswered]
        fresh = [m for m in reversed(fresh) if m.id in self.wanted]
        for victim in [*self.idle(), *fresh]:
            if used_bytes(_footprints(staying)) <= self.budget_bytes:
                break
            staying.remove(victim)
            actions.append(self._evict(victim))
            if victim.id in self.wanted:
                refusal = fit(victim.footprint, _footprints(staying), self.budget_bytes)
                victim.error = str(refusal) if refusal else "measured larger than its estimate"
                actions.append(TellPlacer(f"{victim.id}: {victim.error}"))
        return actions

    def _load(self, model: Model, now: float) -> LoadModel:
        assert model.manifest is not None
        self._move(model, "loading")
        model.error, model.load_began = None, now
        most = model.manifest.max_batch_size
        if model.manifest.stateful:
            warm: tuple[int, ...] = ()  # a run would change its state
        elif most > 1 and not model.footprint.measured:
            warm = (1, most)
        else:
            warm = (1,)
        return LoadModel(model.id, warm)

    def _evict(self, model: Model) -> EvictModel:
        self._move(model, "evicting")
        return EvictModel(model.id)

    def _judge(self, model: Model) -> list[Action]:
        """Says so if the model is to be kept from engines from now on."""
        why = model.quarantined
        if why is None:
            return []
        model.error, model.suspect = why, False  # it is not tried again, alone or otherwise
        return [TellPlacer(f"{model.id} failed: {why}")]

    def _failed(self, model: Model, message: str, now: float) -> list[Action]:
        model.retry_at = now + min(_RETRY_S * 2**model.failures, _RETRY_CAP_S)
        model.failures = min(model.failures + 1, 16)
        model.error = message
        return [TellPlacer(f"{model.id} failed: {message}")]

    # --- telling --------------------------------------------------------------------------

    def report(self, model: Model, *, bound: bool, saturated: bool) -> ModelReport:
        """`last_used` is monotonic here; whoever sends the report makes it wall time."""
        wanted = model.id in self.wanted
        phase: Phase = "loading" if wanted or model.stage == "loading" else "absent"
        if model.stage == "ready":
            phase = "ready"
        elif model.error is not None:
            phase = "failed"
        return ModelReport(
            model=model.id,
            tier="device" if model.stage in {"ready", "evicting"} else "disk",
            phase=phase,
            bound=bound,
            footprint=model.footprint,
            held=model.held,
            saturated=saturated,
            arrived=model.arrived,
            answered=model.answered,
            busy_s=model.busy_s,
            seconds_per_item=model.measured.times.seconds_per_item,
            load_seconds=model.measured.load_seconds,
            last_used=model.last_used,
            error=model.error,
        )

    def validate(self) -> None:
        """Raises `AssertionError` where a law of the header does not hold."""
        assert self.overrun or self.used_bytes() <= self.budget_bytes or not self.engine_up
        assert len(self.loading()) <= self.max_loading, self
        assert self._resident == {m.id: m for m in self.models.values() if m.resident}, self
        for model in self.models.values():
            assert not model.resident or self.engine_up, f"{model.id} without an engine"
            assert not model.resident or model.manifest is not None, model
            assert not model.resident or not model.quarantined, model
            if model.stage == "evicting":
                assert not model.consumers, model
                assert not model.unanswered, model
            assert 0 <= model.unanswered <= model.held, model


_COMING = "room is being made"


def _footprints(models: Iterable[Model]) -> list[Footprint]:
    return [model.footprint for model in models]


def _last_used(model: Model) -> tuple[float, ModelId]:
    return model.last_used, model.id
