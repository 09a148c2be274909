"""The lifecycle of models on one device, without a host tier (test_swaps.py has one)."""

from __future__ import annotations

from math import inf

import msgspec

from services.worker.core.events import (
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
from services.worker.core.laws import check
from services.worker.core.placing import place
from services.worker.core.state import WorkerState
from services.worker.core.victims import Activity
from shared.models import Manifest
from shared.names import ModelId, model_id


def manifest(name: str, size: int, **spec) -> Manifest:
    return Manifest(
        name=name, version=1, digest="sha256:" + "0" * 64, size_bytes=size, created_at=0.0, **spec
    )


def loaded(model: str, size: int) -> ModelLoaded:
    return ModelLoaded(ModelId(model), (), size, 0.1)


class Device:
    """A device of 100 bytes on which everything goes well, unless a test says otherwise."""

    def __init__(self, **sizes: int) -> None:
        self.state = WorkerState()
        self.state.engine_started(EngineStarted(100, "cpu"))
        self.sizes = {model_id(name, 1): size for name, size in sizes.items()}
        self.log: list[str] = []
        self.now = 0.0

    def want(self, *names: str) -> None:
        self.state.assigned([model_id(name, 1) for name in names], self.now)
        self.settle()

    def step(self) -> list[object]:
        self.now += 1.0
        self.state.quiesce = False
        actions = place(
            self.state,
            self.now,
            lambda model: Activity(inf, running=model.unanswered > 0),
            batches_running=False,
            may_load=True,
            slots=self.state.max_loading,
        )
        check(self.state)
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
                self.state.loaded(loaded(model, self.sizes[model]), self.now)
                self.state.get(model).last_used = self.now
            case EvictModel(model=model):
                self.log.append(f"-{model}")
                self.state.evicted(ModelEvicted(model))

    def ready(self) -> set[ModelId]:
        return {m.id for m in self.state.ready()}


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
    for model in ("a/1", "b/1"):
        device.state.get(ModelId(model)).consumers = int(model == "a/1")
    grown = device.state.get(ModelId("b/1")).measured
    grown.weights_bytes = 50
    device.state.workspace_grew()
    device.settle()
    assert device.ready() == {"a/1"}
    device.want("a", "b")
    assert "needs 50 bytes, 40 are free" in str(device.state.get(ModelId("b/1")).error)


def refused_load(code: str):
    """b's load, beside a, which nobody wants any more; and what is done about it."""
    device = Device(a=10, b=10)
    device.want("a")
    device.state.assigned([ModelId("b/1")], device.now)
    for action in device.step():
        device.do(action)
    (load,) = device.step()
    assert isinstance(load, LoadModel)
    failed = LoadFailed(load.model, code, "no")
    evictions = [a for a in device.state.load_failed(failed, device.now) if type(a) is EvictModel]
    return device, evictions


def test_a_failed_load_is_tried_again_later():
    """With growing pauses; nobody makes room for what fails for another reason."""
    device, evictions = refused_load("model_failed")
    assert not evictions
    assert device.state.next_retry(device.now) == device.now + 2.0
    assert device.step() == []
    assert [type(action) for action in device.step()] == [LoadModel]


def test_a_device_fuller_than_believed_is_made_room_on_at_once():
    """Nobody waits while there is somebody who can go; then as with any failure."""
    device, evictions = refused_load("resource_exhausted")
    assert [eviction.model for eviction in evictions] == ["a/1"]
    assert device.state.next_retry(device.now) is None
    device.do(evictions[0])
    (load,) = device.step()
    assert isinstance(load, LoadModel)
    again = device.state.load_failed(LoadFailed(load.model, "resource_exhausted", "no"), device.now)
    assert [type(action) for action in again] == [TellPlacer]
    assert device.state.next_retry(device.now) == device.now + 2.0


def test_loads_follow_each_other_without_a_pause():
    """So many are under way at once; those behind the first count their time from its end."""
    device = Device(a=10, b=10, c=10, d=10, e=10)

    def oldest():
        load = device.state.oldest_load()
        return load and (load.id, load.load_began)

    assert oldest() is None
    device.state.assigned([model_id(name, 1) for name in "abcde"], device.now)
    for action in device.step():
        device.do(action)
    began = device.now + 1.0
    assert [type(action) for action in device.step()] == [LoadModel] * 4
    assert oldest() == ("a/1", began)
    device.state.loaded(loaded("c/1", 10), began + 1.0)
    assert oldest() == ("a/1", began)
    device.state.loaded(loaded("a/1", 10), began + 4.0)
    assert oldest() == ("b/1", began + 4.0)
    assert [action.model for action in device.step()] == ["e/1"]


def test_of_several_loads_the_first_is_guilty():
    """The others only load alone next time."""
    device = Device(a=10, b=10)
    device.state.assigned([model_id(name, 1) for name in "ab"], device.now)
    for action in device.step():
        device.do(action)
    device.step()
    device.state.engine_lost(batch_running=False)
    assert [m.load_deaths for m in device.state.models.values()] == [1, 0]
    assert all(m.suspect for m in device.state.models.values())
    device.state.engine_started(EngineStarted(100, "cpu"))
    assert [action.model for action in device.step()] == ["a/1"]
    device.state.loaded(loaded("a/1", 10), device.now)
    assert [action.model for action in device.step()] == ["b/1"]


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
        device.state.engine_started(EngineStarted(100, "cpu"))
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
