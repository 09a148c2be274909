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
    ItemSettled,
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
from shared.models import Manifest
from shared.names import ModelId, model_id

BUDGET = 100
MODELS = [model_id(f"m{n}", 1) for n in range(6)]
SIZES = dict(zip(MODELS, [20, 30, 40, 50, 60, 150], strict=True))
MANIFESTS = {
    name: Manifest(
        name=name.partition("/")[0],
        version=1,
        digest="sha256:" + "0" * 64,
        size_bytes=SIZES[name],
        created_at=0.0,
        max_batch_size=[8, 4, 1, 0, 16, 8][n],
        stateful=n == 3,
        max_queue_delay_us=20_000 if n == 1 else 0,
    )
    for n, name in enumerate(MODELS)
}


class World(RuleBasedStateMachine):
    """Keeps what the core asked for and lets it happen, fail, or get lost."""

    def __init__(self) -> None:
        super().__init__()
        self.core = WorkerCore(
            max_held_bytes=60, max_bytes_under_way=40, batch_timeout_s=4.0, load_timeout_s=5.0
        )
        self.now = 100.0
        self.engine_up = False
        self.condemned = False
        self.registered = MANIFESTS
        self.fetching: list[ModelId] = []
        self.engine_work: list[LoadModel | EvictModel] = []
        self.on_device: dict[ModelId, int] = {}
        self.batches: dict[int, RunBatch] = {}
        self.consumers: dict[int, tuple[ModelId, str]] = {}
        self.last_item = 0
        self.done: dict[int, str] = {}
        self.arrived: set[int] = set()
        self.unsettled: list[int] = []
        self.generation = 0
        self.oversized = False

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
                self.engine_work.append(action)
            case EvictModel():
                assert self.engine_up
                assert not any(b.model == action.model for b in self.batches.values())
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
            case KeepProfile() | TellPlacer():
                pass
            case _:
                raise AssertionError(action)

    @initialize(models=st.lists(st.sampled_from(MODELS[:4]), unique=True, min_size=1, max_size=3))
    def a_busy_day(self, models: list[ModelId]) -> None:
        """Begins where the interesting things happen: an engine, and models bound."""
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
        self.tell(EngineStarted(BUDGET, "cpu"))

    @precondition(lambda self: self.engine_up)
    @rule(really=st.sampled_from([False] * 4 + [True]))
    def engine_dies(self, really: bool) -> None:
        if not really and not self.batches and not self.condemned:
            return
        self.engine_up = self.condemned = False
        self.engine_work.clear()
        self.on_device.clear()
        self.batches.clear()
        self.oversized = False
        self.tell(EngineLost("killed"))

    @precondition(lambda self: self.fetching)
    @rule(ok=st.sampled_from([True] * 5 + [False]))
    def fetch_ends(self, ok: bool) -> None:
        model = self.fetching.pop(0)
        fetched = ModelFetched(model, self.registered[model])
        self.tell(fetched if ok else FetchFailed(model, "not found"))

    @rule(model=st.sampled_from(MODELS))
    def registered_anew(self, model: ModelId) -> None:
        """Removed, and registered under the same name with another file."""
        digest = f"sha256:{len(self.arrived):064}"
        anew = msgspec.structs.replace(self.registered[model], digest=digest)
        self.registered = self.registered | {model: anew}

    @precondition(lambda self: self.engine_work)
    @rule(how=st.sampled_from(["well", "well", "well", "well", "well", "larger", "badly", "full"]))
    def engine_moves_a_model(self, how: str) -> None:
        work = self.engine_work.pop(0)
        if isinstance(work, EvictModel):
            del self.on_device[work.model]
            self.tell(ModelEvicted(work.model))
        elif how in {"badly", "full"}:
            code = "model_failed" if how == "badly" else "resource_exhausted"
            self.tell(LoadFailed(work.model, code, "no"))
        else:
            size = SIZES[work.model] + 15 * (how == "larger")
            self.oversized |= how == "larger"
            self.on_device[work.model] = size
            self.tell(ModelLoaded(work.model, (), size, {1: 1}, {1: 0.004}, 0.1))

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
            self.tell(BatchRan(id_, (), 0.005, workspace))
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
        """Unless a model was measured larger than its file said."""
        loads = [work.model for work in self.engine_work if isinstance(work, LoadModel)]
        taken = sum(self.on_device.values()) + sum(SIZES[m] for m in loads)
        assert self.oversized or taken <= BUDGET

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
        assert self.core.empty, self.core
        assert self.done.keys() == self.arrived
        assert not self.consumers
        self.assigned([], drain=False)
        for model in self.core.state.models.values():
            killer = model.load_deaths or model.buried or model.suspect
            assert killer or model.id in self.on_device, "it is remembered for nothing"

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
            self.engine_moves_a_model(how="well")
        if self.unsettled:
            self.replies_are_sent(count=100)
        self.tell()


World.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestWorld = World.TestCase
