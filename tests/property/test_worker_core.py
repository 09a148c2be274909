"""The worker's core against a world that does what it says, in any order it can happen in."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from services.worker.core.events import (
    Answer,
    Assigned,
    BatchFailed,
    BatchRan,
    Bury,
    CloseConsumer,
    ConsumerGone,
    ConsumerStarted,
    ConsumerStopped,
    DeathKept,
    DrainAsked,
    EngineLost,
    EngineStarted,
    EvictModel,
    Fact,
    Fault,
    FetchFailed,
    FetchModel,
    ForgetModel,
    GiveBack,
    Item,
    ItemArrived,
    ItemCancelled,
    ItemSettled,
    KeepDeath,
    KeepProfile,
    KillEngine,
    LoadFailed,
    LoadModel,
    ModelEvicted,
    ModelFetched,
    ModelLoaded,
    Refuse,
    RunBatch,
    StartConsumer,
    StopConsumer,
    TellPlacer,
)
from services.worker.core.worker import WorkerCore
from shared.layout import Block, Layout
from shared.layout.model import ALIGNMENT
from shared.models import Case, Manifest
from shared.names import ModelId, model_id

BUDGET = 100
"""Bytes are counted in units of a block's alignment here."""
MODELS = [model_id(f"m{n}", 1) for n in range(6)]
SIZES = dict(zip(MODELS, [20, 30, 40, 50, 60, 150], strict=True))
ARCHITECTURES = dict(zip(MODELS, "aabbc", strict=False)) | {MODELS[5]: ""}
MANIFESTS = {
    name: Manifest(
        name=name.partition("/")[0],
        version=1,
        digest="sha256:" + "0" * 64,
        size_bytes=SIZES[name] * ALIGNMENT,
        created_at=0.0,
        max_batch_size=[8, 4, 1, 0, 16, 8][n],
        stateful=n == 3,
        max_queue_delay_us=20_000 if n == 1 else 0,
    )
    for n, name in enumerate(MODELS)
}
LAYOUTS = {
    name: Layout(
        architecture=ARCHITECTURES[name], blocks=(Block(bytes(32), 0, ALIGNMENT),) * SIZES[name]
    )
    for name in MODELS[:5]
}


class World(RuleBasedStateMachine):
    """Keeps what the core asked for and lets it happen, fail, or get lost."""

    def __init__(self) -> None:
        super().__init__()
        self.core = WorkerCore(
            max_held_bytes=60, max_bytes_under_way=40, batch_timeout_s=4.0, load_timeout_s=5.0
        )
        self.now = 100.0
        self.host_budget = 0
        self.engine_up = False
        self.condemned = False
        self.registered = MANIFESTS
        self.fetching: list[ModelId] = []
        self.engine_work: list[LoadModel | EvictModel] = []
        self.on_device: dict[ModelId, int] = {}
        self.in_host: set[ModelId] = set()
        self.whole: set[str] = set()
        """Architectures that turned out to need a program for each file."""
        self.batches: dict[int, RunBatch] = {}
        self.consumers: dict[int, tuple[ModelId, str]] = {}
        self.last_item = 0
        self.done: dict[int, str] = {}
        self.arrived: set[int] = set()
        self.unsettled: list[int] = []
        self.generation = 0
        self.oversized = False
        self.keeping: list[ModelId] = []
        """Deaths on their way into the registry."""
        self.quarantined: set[ModelId] = set()
        """As all workers together have it."""
        self.kept_away: set[ModelId] = set()
        """Were quarantined when they were fetched last."""

    def tell(self, *facts: Fact) -> None:
        for action in self.core.handle(list(facts), self.now):
            self.act(action)

    def finish(self, item: int, how: str) -> None:
        assert item in self.arrived
        assert item not in self.done, f"item {item} was {self.done[item]}, now {how}"
        self.done[item] = how
        self.unsettled.append(item)

    def act(self, action: object) -> None:
        match action:
            case FetchModel():
                self.fetching.append(action.model)
            case LoadModel():
                assert self.engine_up
                assert not self.condemned
                assert action.model not in self.kept_away, "it is quarantined"
                self.engine_work.append(action)
            case EvictModel():
                assert self.engine_up
                running = any(b.model == action.model for b in self.batches.values())
                assert action.tier == "host" or not running
                self.engine_work.append(action)
            case StartConsumer():
                self.consumers[action.subscription] = (action.model, "starting")
            case StopConsumer():
                model, _ = self.consumers[action.subscription]
                self.consumers[action.subscription] = (model, "stopping")
            case CloseConsumer():
                del self.consumers[action.subscription]
            case RunBatch():
                assert self.engine_up
                assert not self.condemned
                assert action.model in self.on_device
                assert EvictModel(action.model, "device") not in self.engine_work
                self.batches[action.batch] = action
            case Answer():
                for item in action.items:
                    self.finish(item, "answered")
            case Refuse():
                self.finish(action.item, "refused")
            case GiveBack():
                self.finish(action.item, "given back")
            case Bury():
                self.finish(action.item, "buried")
            case KillEngine():
                assert self.engine_up
                assert not self.condemned, "it is killed once"
                assert self.batches or self.engine_work, "nothing hangs"
                self.condemned = True
            case ForgetModel():
                assert action.model not in {m for m, _ in self.consumers.values()}
                assert action.model not in self.on_device
                assert action.model not in self.in_host
            case KeepDeath():
                self.keeping.append(action.model)
            case KeepProfile() | TellPlacer():
                pass
            case _:
                raise AssertionError(action)

    @initialize(
        models=st.lists(st.sampled_from(MODELS[:4]), unique=True, min_size=1, max_size=4),
        host=st.sampled_from([0, 60, 150]),
    )
    def a_busy_day(self, models: list[ModelId], host: int) -> None:
        """Begins where the interesting things happen: an engine, and models bound."""
        self.host_budget = host
        self.engine_starts()
        self.assigned(models, drain=False)
        for _ in range(20):
            self._one_step()

    # --- what may happen ------------------------------------------------------------------

    @rule(passed=st.sampled_from([0.0, 0.001, 0.01, 0.5, 3.0]))
    def time_passes(self, passed: float) -> None:
        self.now += passed
        self.tell()

    @rule(
        models=st.lists(st.sampled_from(MODELS), unique=True, max_size=4),
        drain=st.sampled_from([False] * 5 + [True]),
    )
    def assigned(self, models: list[ModelId], drain: bool) -> None:
        self.generation += 1
        self.tell(Assigned(tuple(models), 1, self.generation, drain and not models))

    @precondition(lambda self: not self.engine_up)
    @rule()
    def engine_starts(self) -> None:
        self.engine_up = True
        self.tell(EngineStarted(BUDGET * ALIGNMENT, "cpu", self.host_budget * ALIGNMENT))

    @precondition(lambda self: self.engine_up)
    @rule(really=st.sampled_from([False] * 4 + [True]))
    def engine_dies(self, really: bool) -> None:
        if not really and not self.batches and not self.condemned:
            return
        self.engine_up = self.condemned = False
        self.engine_work.clear()
        self.on_device.clear()
        self.in_host.clear()
        self.batches.clear()
        self.oversized = False
        self.tell(EngineLost("killed"))

    @precondition(lambda self: self.fetching)
    @rule(ok=st.sampled_from([True] * 5 + [False]))
    def fetch_ends(self, ok: bool) -> None:
        model = self.fetching.pop(0)
        held = model in self.quarantined
        fetched = ModelFetched(
            model,
            self.registered[model],
            layout=LAYOUTS.get(model),
            quarantined="it ended others" if held else None,
        )
        if ok:
            (self.kept_away.add if held else self.kept_away.discard)(model)
        self.tell(fetched if ok else FetchFailed(model, "not found"))

    @precondition(lambda self: self.keeping)
    @rule(enough=st.booleans())
    def a_death_is_kept(self, enough: bool) -> None:
        """And with what other workers saw, it may be enough."""
        model = self.keeping.pop(0)
        if enough:
            self.quarantined.add(model)
        self.tell(DeathKept(model))

    @rule(model=st.sampled_from(MODELS))
    def another_worker_sees_it_die(self, model: ModelId) -> None:
        self.quarantined.add(model)

    @rule()
    def all_are_released(self) -> None:
        self.quarantined.clear()

    @rule(model=st.sampled_from(MODELS))
    def registered_anew(self, model: ModelId) -> None:
        """Removed, and registered under the same name with another file."""
        digest = f"sha256:{len(self.arrived):064}"
        anew = msgspec.structs.replace(self.registered[model], digest=digest)
        self.registered = self.registered | {model: anew}

    def _possible(self) -> list[int]:
        """Commands that the engine may end next: it obeys in order what is about one model, and
        does evictions before the loads that were ordered after them."""
        found = []
        for n, work in enumerate(self.engine_work):
            before = self.engine_work[:n]
            makes_room = isinstance(work, LoadModel) and any(type(w) is EvictModel for w in before)
            if not makes_room and all(earlier.model != work.model for earlier in before):
                found.append(n)
        return found

    @precondition(lambda self: self.engine_work)
    @rule(
        data=st.data(),
        how=st.sampled_from([*["well"] * 5, "larger", "badly", "full", "whole"]),
    )
    def engine_moves_a_model(self, data: st.DataObject, how: str) -> None:
        self._move_model(data.draw(st.sampled_from(self._possible())), how)

    def _move_model(self, number: int, how: str) -> None:
        work = self.engine_work.pop(number)
        model, architecture = work.model, ARCHITECTURES[work.model]
        if isinstance(work, EvictModel):
            if work.tier == "host":
                self.in_host.discard(model)
            else:
                del self.on_device[model]
            self.tell(ModelEvicted(model, work.tier))
            return
        if how in {"badly", "full"}:
            code = "model_failed" if how == "badly" else "resource_exhausted"
            self.tell(LoadFailed(model, code, "no"))
            return
        if how == "whole" and work.tier == "device":
            self.whole.add(architecture)
            self.in_host = {m for m in self.in_host if ARCHITECTURES[m] != architecture}
        source = "host" if model in self.in_host else "disk"
        apart = model in LAYOUTS and architecture not in self.whole
        apart = apart and not MANIFESTS[model].stateful
        if work.keep_host and apart:
            self.in_host.add(model)
        size = SIZES[model]
        if work.tier == "device":
            size += 15 * (how == "larger")
            self.oversized |= how == "larger"
            self.on_device[model] = size
        elif not apart:
            size = 0
        cases = (Case(1, 0, 0.004, ALIGNMENT),) if work.tier == "device" else ()
        known = "known" if apart else "none"
        self.tell(ModelLoaded(model, (), size * ALIGNMENT, 0.1, cases, work.tier, source, known))

    @precondition(lambda self: self.consumers)
    @rule(data=st.data(), gone=st.sampled_from([False] * 7 + [True]))
    def consumer_moves(self, data: st.DataObject, gone: bool) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.consumers)))
        model, phase = self.consumers[id_]
        if phase == "stopping" or (gone and phase == "on"):
            self.consumers[id_] = (model, "stopped")
            self.tell(ConsumerGone(id_) if gone else ConsumerStopped(id_))
        elif phase == "starting":
            self.consumers[id_] = (model, "on")
            self.tell(ConsumerStarted(id_))

    def _delivering(self) -> list[int]:
        return sorted(i for i, (_, p) in self.consumers.items() if p in {"on", "stopping"})

    @precondition(lambda self: self._delivering())
    @rule(
        data=st.data(),
        count=st.integers(1, 6),
        nbytes=st.sampled_from([1, 5, 30]),
        late=st.sampled_from([None, None, 0.0, 0.02, 1.0]),
        fault=st.sampled_from([None] * 6 + ["fault", "dead"]),
    )
    def items_arrive(self, data, count, nbytes, late, fault) -> None:
        id_ = data.draw(st.sampled_from(self._delivering()))
        model, _ = self.consumers[id_]
        facts: list[Fact] = []
        for _ in range(count):
            self.last_item += 1
            self.arrived.add(self.last_item)
            item = Item(
                item=self.last_item,
                model=model,
                subscription=id_,
                rows=data.draw(st.integers(1, max(MANIFESTS[model].max_batch_size, 1))),
                kind=(("x", "FP32", (data.draw(st.sampled_from([4, 4, 8])),)),),
                nbytes=nbytes,
                arrived=self.now,
                deadline=None if late is None else self.now + late,
            )
            facts.append(
                ItemArrived(
                    item,
                    Fault("invalid_argument", "wrong") if fault == "fault" else None,
                    "no reply_to" if fault == "dead" else None,
                )
            )
        self.tell(*facts)

    @precondition(lambda self: self.batches)
    @rule(
        how=st.sampled_from(
            ["ran", "ran", "ran", "model_failed", "resource_exhausted", "too_large", "not_found"]
        ),
        workspace=st.sampled_from([0, 1, 25]),
    )
    def a_batch_ends(self, how: str, workspace: int) -> None:
        id_ = min(self.batches)
        batch = self.batches.pop(id_)
        self.now += 0.005
        if how == "ran":
            self.oversized |= workspace > 1
            self.tell(BatchRan(id_, (), 0.005, workspace * ALIGNMENT))
        elif how == "not_found" and sum(b.model == batch.model for b in self.batches.values()):
            self.batches[id_] = batch  # an engine that forgot it would refuse all its batches
        else:
            if how == "not_found":
                del self.on_device[batch.model]
            self.tell(BatchFailed(id_, how, "no"))

    @rule(steps=st.integers(1, 5))
    def all_goes_well(self, steps: int) -> None:
        for _ in range(steps):
            self._one_step()

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def a_client_hangs_up(self, data: st.DataObject) -> None:
        """Whether its item waits, runs, or is done."""
        self.tell(ItemCancelled(data.draw(st.integers(1, self.last_item))))

    @precondition(lambda self: self.unsettled)
    @rule(count=st.integers(1, 8))
    def replies_are_sent(self, count: int) -> None:
        now, self.unsettled = self.unsettled[:count], self.unsettled[count:]
        self.tell(*(ItemSettled(item) for item in now))

    # --- what holds always ----------------------------------------------------------------

    @invariant()
    def laws_hold(self) -> None:
        self.core.validate()

    @invariant()
    def the_device_is_never_overfilled(self) -> None:
        """Unless a model was measured larger than its file said. What waits for an eviction
        takes nothing yet."""
        begun = [self.engine_work[n] for n in self._possible()]
        loads = [work for work in begun if isinstance(work, LoadModel)]
        device = [work.model for work in loads if work.tier == "device"]
        taken = sum(self.on_device.values()) + sum(SIZES[model] for model in device)
        assert self.oversized or taken <= BUDGET
        host = self.in_host | {work.model for work in loads if work.keep_host}
        host = {m for m in host if m in self.in_host or ARCHITECTURES[m] not in self.whole}
        assert sum(SIZES[model] for model in host) <= self.host_budget

    @invariant()
    def at_most_one_live_consumer_of_a_model(self) -> None:
        live = [model for model, phase in self.consumers.values() if phase != "stopped"]
        assert len(live) == len(set(live))

    @invariant()
    def nothing_exceeds_its_batch(self) -> None:
        for batch in self.batches.values():
            assert batch.rows <= max(MANIFESTS[batch.model].max_batch_size, 1)
            if MANIFESTS[batch.model].stateful:
                assert len(batch.items) == 1

    def teardown(self) -> None:
        """At the end of everything every item has had exactly one answer."""
        self.tell(DrainAsked())
        for _ in self._until_quiet():
            self._one_step()
        while self.keeping:
            self.a_death_is_kept(enough=False)
        assert self.core.empty, self.core
        assert self.done.keys() == self.arrived
        assert not self.consumers
        self.assigned([], drain=False)
        for model in self.core.state.models.values():
            killer = model.load_deaths or model.buried or model.suspect
            held = model.id in self.on_device or model.id in self.in_host
            assert killer or held, "it is remembered for nothing"

    def _until_quiet(self) -> Iterator[int]:
        for step in range(2000):
            if self.core.empty and not self.fetching and not self.engine_work:
                return
            yield step
        raise AssertionError(f"never quiet: {self.core}")

    def _one_step(self) -> None:
        self.now += 0.01
        if self.condemned:
            self.engine_dies(really=True)
        for id_, (model, phase) in list(self.consumers.items()):
            if phase == "stopping":
                self.consumers[id_] = (model, "stopped")
                self.tell(ConsumerStopped(id_))
            elif phase == "starting":
                self.consumers[id_] = (model, "on")
                self.tell(ConsumerStarted(id_))
        if self.batches:
            id_ = min(self.batches)
            del self.batches[id_]
            self.tell(BatchRan(id_, (), 0.005, 0))
        if self.fetching:
            self.fetch_ends(ok=True)
        if self.engine_work:
            self._move_model(self._possible()[0], "well")
        if self.unsettled:
            self.replies_are_sent(count=100)
        self.tell()


World.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestWorld = World.TestCase
