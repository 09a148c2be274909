"""The lifecycle of models on one device."""

from __future__ import annotations

import msgspec

from services.worker.core.events import (
    EvictModel,
    FetchModel,
    LoadFailed,
    LoadModel,
    ModelFetched,
    ModelLoaded,
    TellPlacer,
)
from services.worker.core.state import WorkerState
from shared.models import Manifest, Profile
from shared.names import ModelId, model_id


def manifest(name: str, size: int, **spec) -> Manifest:
    return Manifest(
        name=name, version=1, digest="sha256:" + "0" * 64, size_bytes=size, created_at=0.0, **spec
    )


class Device:
    """A device of 100 bytes on which everything goes well, unless a test says otherwise."""

    def __init__(self, **sizes: int) -> None:
        self.state = WorkerState()
        self.state.engine_started(100, "cpu")
        self.sizes = {model_id(name, 1): size for name, size in sizes.items()}
        self.log: list[str] = []
        self.now = 0.0

    def want(self, *names: str) -> None:
        self.state.assigned([model_id(name, 1) for name in names], self.now)
        self.settle()

    def step(self) -> list[object]:
        self.now += 1.0
        actions = self.state.reconcile(self.now, batches_running=False, may_load=True)
        self.state.validate()
        return list(actions)

    def settle(self) -> None:
        while actions := [a for a in self.step() if not isinstance(a, TellPlacer)]:
            for action in actions:
                self.do(action)

    def do(self, action: object) -> None:
        match action:
            case FetchModel(model=model):
                name = model.partition("/")[0]
                self.state.fetched(ModelFetched(model, manifest(name, self.sizes[model])))
            case LoadModel(model=model):
                self.log.append(f"+{model}")
                self.state.loaded(ModelLoaded(model, (), self.sizes[model], {}, {}, 0.1))
                self.state.get(model).last_used = self.now
            case EvictModel(model=model):
                self.log.append(f"-{model}")
                self.state.evicted(model)

    def ready(self) -> set[ModelId]:
        return {m.id for m in self.state.residents() if m.stage == "ready"}


def test_room_is_made_by_the_least_recently_used():
    """Only as many go as must, and who need not go after all stays."""
    device = Device(a=20, b=40, c=30, d=40)
    device.want("a", "b", "c")
    device.want("d")
    assert device.log == ["+a/1", "+b/1", "+c/1", "-b/1", "+d/1"]


def test_what_is_wanted_or_busy_is_not_evicted():
    """The newcomer waits for the busy one, and is refused beside wanted ones, with numbers."""
    device = Device(a=60, b=60)
    device.want("a")
    device.state.get(ModelId("a/1")).unanswered = device.state.get(ModelId("a/1")).held = 1
    device.want("b")
    assert device.log == ["+a/1"]
    assert device.state.get(ModelId("b/1")).error is None
    device.state.get(ModelId("a/1")).unanswered = 0
    device.want("a", "b")
    assert device.state.get(ModelId("b/1")).error == (
        "no room on the device: needs 60 bytes, 40 are free"
    )
    device.want("b")
    assert device.ready() == {"b/1"}


def test_nothing_is_evicted_for_what_cannot_fit_anyway():
    """A model larger than the device costs nobody's weights."""
    device = Device(a=60, huge=101)
    device.want("a")
    device.want("huge")
    assert device.ready() == {"a/1"}
    assert "larger than the whole device budget" in str(device.state.get(ModelId("huge/1")).error)


def test_a_model_measured_too_large_goes_again():
    """When evicting others does not help, the newcomer itself goes, and says why."""
    device = Device(a=60, b=30)
    device.want("a", "b")
    device.state.loaded(ModelLoaded(ModelId("b/1"), (), 30, {}, {}, 0.1))
    device.want("a")
    device.sizes[ModelId("b/1")] = 30
    for model in ("a/1", "b/1"):
        device.state.get(ModelId(model)).consumers = int(model == "a/1")
    grown = device.state.get(ModelId("b/1")).measured
    grown.weights_bytes = 50
    device.state.workspace_grew()
    device.settle()
    assert device.ready() == {"a/1"}
    device.want("a", "b")
    assert "needs 50 bytes, 40 are free" in str(device.state.get(ModelId("b/1")).error)


def test_a_failed_load_is_tried_again_later():
    """With growing pauses, and an idle model goes when the device was fuller than believed."""
    device = Device(a=10, b=10)
    device.want("a")
    device.state.assigned([ModelId("b/1")], device.now)
    for action in device.step():
        device.do(action)
    (load,) = device.step()
    assert isinstance(load, LoadModel)
    failed = LoadFailed(load.model, "resource_exhausted", "out of memory")
    evictions = [a for a in device.state.load_failed(failed, device.now) if type(a) is EvictModel]
    assert [eviction.model for eviction in evictions] == ["a/1"]
    assert device.state.next_retry(device.now) == device.now + 2.0
    device.do(evictions[0])
    assert device.step() == []
    assert [type(action) for action in device.step()] == [LoadModel]


def test_warm_up_runs_are_for_what_is_not_known():
    """One row for all, the greatest batch when nobody measured it, none for stateful models."""
    state = WorkerState()
    state.engine_started(1000, "cpu")
    names = [model_id(name, 1) for name in ("fresh", "known", "stateful")]
    specs = [{"max_batch_size": 8}, {"max_batch_size": 8}, {"stateful": True}]
    state.assigned(names, 0.0)
    state.reconcile(0.0, batches_running=False, may_load=True)
    for name, spec in zip(names, specs, strict=True):
        profile = Profile(device_kind="cpu", weights_bytes=9) if name == "known/1" else None
        state.fetched(ModelFetched(name, manifest(name.partition("/")[0], 10, **spec), profile))
    state.max_loading = 3
    loads = state.reconcile(0.0, batches_running=False, may_load=True)
    assert [load.warm_rows for load in loads if isinstance(load, LoadModel)] == [(1, 8), (1,), ()]


def test_a_model_that_kills_engines_at_load_stays_away_until_its_file_is_another():
    """Assigned again it says so at once; it is fetched, but loaded only with a new digest."""
    device = Device(a=10)
    device.state.assigned([ModelId("a/1")], 0.0)
    for _ in range(2):
        while not device.state.loading():
            for action in device.step():
                if isinstance(action, FetchModel):
                    device.do(action)
        device.state.engine_lost(batch_running=False)
        device.state.engine_started(100, "cpu")
    model = device.state.get(ModelId("a/1"))
    assert model.error == "quarantined: it ended 2 engines as it was loaded"
    for _ in range(2):
        device.want()
        device.now += 10.0
        device.want("a")
        assert device.log == []
        assert model.error == "quarantined: it ended 2 engines as it was loaded"
        assert device.state.next_retry(device.now) is None
    device.want()
    device.state.assigned([model.id], device.now)
    assert [type(action) for action in device.step()] == [FetchModel]
    anew = msgspec.structs.replace(manifest("a", 10), digest="sha256:" + "1" * 64)
    device.state.fetched(ModelFetched(model.id, anew))
    device.settle()
    assert device.ready() == {"a/1"}
    assert model.error is None
