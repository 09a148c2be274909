"""Where the models of one worker are, and what they take of its tiers: disk, host, device.

What comes and what goes is decided in placing.py (for what is wanted) and swaps.py (for what is
asked); here it is done, and what the engine says is taken in. Laws (`laws.check`):
- What is on the device, or on its way there, fits the budget together, unless a measurement found
  a model larger than was believed (`overrun`); then nothing is loaded until it fits again. Copies
  in the host's memory fit that budget. What the engine was told to give up counts no more: it
  does that before whatever it is told later.
- At most `max_loading` models are loading; a suspect loads alone. Only fetched models load.
- No model leaves the device while a batch of it is under way. Without a host tier, only a model
  that is not wanted, has no consumer and no unanswered item does; with one, what is wanted may
  leave as well, but not what keeps a state.
- The least recently used goes first, and nothing goes unless that makes the room that is needed.
- A wanted model is admitted if all that is admitted can be served together
  (`shared.fit.fit_tiers`); else it has an `error` that says why, with numbers.
- A model that killed engines too often is not loaded again until its file is another one, or all
  workers together say so when it is fetched.
- Known is only what is wanted, fetched, in a tier, consumed, held, or has killed an engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from services.worker.core.claims import Claims
from services.worker.core.events import (
    Action,
    EngineStarted,
    EvictModel,
    FetchModel,
    LoadFailed,
    LoadModel,
    ModelEvicted,
    ModelFetched,
    ModelLoaded,
    TellPlacer,
)
from services.worker.core.model import Model, Stage, by_last_use
from services.worker.core.profile import warm_ups
from services.worker.core.room import Room
from shared.names import ModelId


class WorkerState:
    """The models of one worker against its budgets."""

    def __init__(self, *, max_loading: int = 4, share: bool = True) -> None:
        self.max_loading = max_loading
        self.device_kind = ""
        self.engine_up = False
        self.overrun = False
        self.quiesce = False
        """A suspect load waits for the device to be quiet: no further batch should begin."""
        self.condemned = False
        """The engine hangs and is about to be killed: nothing is begun on it, or it would be
        taken for what hung."""
        self.incomplete = False
        """Something wanted is not where it should be."""
        self.kept_out = False
        """Something wanted is not served since so much else is on its way: it is next."""
        self.wanted: dict[ModelId, None] = {}
        self.models: dict[ModelId, Model] = {}
        self.leaving: set[ModelId] = set()
        """What is to go once its batches have ended: it gets no further ones."""
        self.chosen: set[ModelId] = set()
        """What was to go so at the last look: it goes before what is as busy."""
        self.device = Room()
        self.host = Room()
        self.claims = Claims()
        self._share = share
        self._loading: dict[ModelId, Model] = {}
        """In the order in which the engine was told."""
        self._evicting: dict[ModelId, Model] = {}
        self._whole: set[str] = set()
        """Architectures of which each file needs a program of its own."""

    def __repr__(self) -> str:
        stages: list[str] = [m.stage for m in self.models.values()]
        shown = ("ready", "loading", "evicting", "fetching")
        told = ", ".join(f"{stages.count(stage)} {stage}" for stage in shown)
        return (
            f"WorkerState({len(self.wanted)} wanted, {told}, "
            f"device={self.device}, host={self.host})"
        )

    # --- questions ------------------------------------------------------------------------

    def get(self, model: ModelId) -> Model:
        known = self.models.get(model)
        if known is None:
            known = self.models[model] = Model(model)
        return known

    @property
    def swapping(self) -> bool:
        """There is a host tier: what is wanted need not all be on the device."""
        return self.host.budget_bytes > 0

    def used_bytes(self) -> int:
        return self.device.used_bytes()

    def is_ready(self, model: ModelId) -> bool:
        """It may be given batches."""
        known = self.models.get(model)
        return known is not None and known.stage == "ready" and model not in self.leaving

    def is_served(self, model: ModelId) -> bool:
        """Its requests can be taken: it is on the device, or is brought there for them."""
        known = self.models[model]
        return known.stage == "ready" or (known.served and known.error is None)

    def loading(self) -> list[Model]:
        """On their way into either tier, the one that was told of first before the others."""
        return list(self._loading.values())

    def may_load(self, slots: int) -> bool:
        """Whether something more may be brought in, with at most so many on their way."""
        loading = self._loading.values()
        alone = self.quiesce or any(model.suspect for model in loading)
        return not (alone or self.overrun) and len(loading) < slots

    def ready(self) -> list[Model]:
        return [m for name in self.device if (m := self.models[name]).stage == "ready"]

    def idle(self) -> list[Model]:
        """What nobody wants and nothing hangs on, least recently used first."""
        return sorted(
            (
                model
                for model in self.ready()
                if model.id not in self.wanted and not model.consumers and not model.unanswered
            ),
            key=by_last_use,
        )

    def waiting(self, now: float) -> list[Model]:
        """What is wanted and not where it should be, in the placer's order."""
        return [m for m in map(self.get, self.wanted) if m.is_due and m.retry_at <= now]

    # --- facts ----------------------------------------------------------------------------

    def assigned(self, models: Iterable[ModelId], now: float) -> None:
        before = self.wanted
        self.wanted = dict.fromkeys(models)
        for name in before.keys() - self.wanted.keys():
            model = self.get(name)
            model.error, model.eager = None, False
            self.claims.release(model)
        for name in self.wanted:
            if name in before:
                continue
            model = self.get(name)
            model.error, model.failures, model.retry_at = model.quarantined, 0, now
            model.eager, model.refused_at = True, -1
            if model.stage == "absent" and model.copy == "none":
                model.manifest = None  # it may have been registered anew since
            if model.stage == "ready":
                self.claims.take(model)  # where it is, it may stay
                model.served, model.eager = True, False

    def engine_started(self, fact: EngineStarted) -> None:
        self.engine_up = True
        self.condemned = False
        self.device_kind = fact.device_kind
        self.device.budget_bytes = fact.budget_bytes
        self.host.budget_bytes = fact.host_budget_bytes
        self.claims.budgets = (fact.budget_bytes, fact.host_budget_bytes)
        for model in self.models.values():
            model.refused_at = -1

    def engine_lost(self, *, batch_running: bool) -> list[Action]:
        """Nothing is in any tier any more. Loads under way are suspects; the one that was told
        of first is guilty when no batch ran beside it."""
        self.engine_up = self.overrun = self.quiesce = self.condemned = False
        actions: list[Action] = []
        loading, evicting = self.loading(), list(self._evicting.values())
        for model in loading:
            model.suspect = True
            if model is loading[0] and not batch_running:
                actions += model.died_loading()
        for model in [*loading, *evicting, *self.ready()]:
            self._move(model, "absent")
        for model in self.models.values():
            model.copy, model.eager = "none", model.id in self.wanted
            self.claims.release(model)
        self.host.clear()
        self.leaving.clear()
        self.chosen.clear()
        self.incomplete = True
        return actions

    def fetched(self, fact: ModelFetched) -> None:
        model = self.get(fact.model)
        if model.stage != "fetching":
            return
        self._move(model, "absent")
        key = fact.layout.architecture if fact.layout is not None else ""
        model.fetched(fact, apart=key not in self._whole, share=self._share)

    def fetch_failed(self, name: ModelId, message: str, now: float) -> list[Action]:
        model = self.get(name)
        if model.stage != "fetching":
            return []
        self._move(model, "absent")
        return self._failed(model, message, now)

    def loaded(self, fact: ModelLoaded, now: float) -> None:
        model = self.get(fact.model)
        if model.stage != "loading":
            return
        self._load_ended(model, now)
        model.error = None
        if model.target == "device":
            model.failures, model.suspect, model.load_deaths = 0, False, 0
            model.eager = False
            self._move(model, "ready")
            model.measured.load(fact)
            self._resized(model)
            if model.id in self.wanted:
                self.claims.take(model)
        else:
            self._move(model, "absent")
        model.copy = "held" if model.copy == "coming" else model.copy
        if model.target == "device" or model.copy == "held":
            model.served = model.admitted  # else there is no copy of it: it is admitted anew
        if model.is_whole(fact):
            self._found_whole(model)

    def load_failed(self, fact: LoadFailed, now: float) -> list[Action]:
        model = self.get(fact.model)
        if model.stage != "loading":
            return []
        self._load_ended(model, now)
        self._move(model, "absent")
        actions: list[Action] = []
        if model.copy == "coming":  # it may have come so far
            actions.append(self.drop_copy(model))
        if model.target == "host" and (model.served or fact.code == "resource_exhausted"):
            # Only its copy is lacking: it comes from the disk when it is asked for.
            model.served, model.eager = model.admitted, False
            model.try_later(now)
            return [*actions, TellPlacer(f"{model.id} has no copy: {fact.message}")]
        if fact.code == "resource_exhausted" and model.target == "device":
            # The device has less room than the sum says: somebody more makes room, and it is
            # tried again at once, as often as there is somebody.
            idle = self.idle()
            if self.swapping:
                idle += sorted((m for m in self.ready() if self.may_swap_out(m)), key=by_last_use)
            if idle:
                self.incomplete = True
                told = f"{model.id} found no room, {idle[0].id} leaves: {fact.message}"
                return [*actions, self.evict(idle[0]), TellPlacer(told)]
        return [*actions, *self._failed(model, fact.message, now)]

    def evicted(self, fact: ModelEvicted) -> None:
        model = self.get(fact.model)
        if fact.tier == "host":
            model.copy = "none" if model.copy == "going" else model.copy
        elif model.stage == "evicting":
            self._move(model, "absent")

    def lost_model(self, name: ModelId) -> None:
        """The engine says that it does not have it."""
        model = self.get(name)
        if model.stage == "ready":
            self._move(model, "absent")
            model.eager, model.served = model.id in self.wanted, False

    def workspace_grew(self) -> None:
        for model in self.ready():
            self._resized(model)

    # --- what the engine is told ----------------------------------------------------------

    def fetch(self, model: Model) -> FetchModel:
        self._move(model, "fetching")
        return FetchModel(model.id)

    def load(
        self, model: Model, now: float, *, tier: Literal["host", "device"], keep: bool
    ) -> LoadModel:
        """`keep`: with a copy in the host's memory, for which there is room."""
        assert model.manifest is not None
        keep = keep or tier == "host" or model.copy == "held"
        if keep and model.copy == "none":
            assert model.as_copy is not None
            model.copy = "coming"
            self.host.put(model.id, model.as_copy)
        model.target = tier
        self._move(model, "loading")
        model.error, model.load_began, model.ran = None, now, False
        warm = warm_ups(model.manifest, model.measured) if tier == "device" else ()
        return LoadModel(model.id, warm, tier, keep)

    def evict(self, model: Model) -> EvictModel:
        """Off the device."""
        self._move(model, "evicting")
        self.leaving.discard(model.id)
        self.incomplete |= model.id in self.wanted and not model.in_host
        self.overrun = self.overrun and self.device.over
        return EvictModel(model.id, "device")

    def drop_copy(self, model: Model) -> EvictModel:
        model.copy = "going"
        self.host.remove(model.id)
        return EvictModel(model.id, "host")

    def may_swap_out(self, model: Model) -> bool:
        """It is wanted, and nothing waits for it or runs."""
        return model.id in self.wanted and not model.pinned and not model.unanswered

    # --- parts ----------------------------------------------------------------------------

    def next_retry(self, now: float) -> float | None:
        """When a failed model is tried again."""
        times = [m.retry_at for m in map(self.get, self.wanted) if m.is_due]
        return min((at for at in times if at > now), default=None)

    def oldest_load(self) -> Model | None:
        """Of those under way, the one that was told of first: the others may wait for it."""
        return next(iter(self._loading.values()), None)

    def forget(self) -> list[ModelId]:
        """Drops the models that nothing hangs on any more."""
        gone = [m.id for m in self.models.values() if m.forgettable and m.id not in self.wanted]
        for name in gone:
            del self.models[name]
        return gone

    def _move(self, model: Model, stage: Stage) -> None:
        model.stage = stage
        for where, among in (("loading", self._loading), ("evicting", self._evicting)):
            if stage == where:
                among[model.id] = model
            else:
                among.pop(model.id, None)
        if model.on_device:
            self.device.put(model.id, model.footprint)
        else:
            self.device.remove(model.id)

    def _resized(self, model: Model) -> None:
        """It takes another amount than was believed."""
        if model.on_device:
            self.device.put(model.id, model.footprint)
            self.overrun = self.device.over
        if model.admitted:
            self.claims.take(model)

    def _load_ended(self, model: Model, now: float) -> None:
        """The load that was told of next may not have begun before."""
        first, *others = self._loading.values()
        if model is first and others:
            others[0].load_began = now

    def _found_whole(self, model: Model) -> None:
        """Its program and its weights cannot be told apart after all, nor those of its like: the
        engine keeps no copies of them."""
        if model.architecture:
            self._whole.add(model.architecture)
        for other in self.models.values():
            same = model.architecture and other.architecture == model.architecture
            if other is model or (same and other.as_copy is not None):
                other.as_copy, other.measured.shares = None, ()
                self.host.remove(other.id)
                other.copy = "none" if other.in_host else other.copy
                self._resized(other)
        self.incomplete = True

    def _failed(self, model: Model, message: str, now: float) -> list[Action]:
        self.claims.release(model)
        self.incomplete = True
        model.eager = model.id in self.wanted
        return [model.failed(message, now)]
