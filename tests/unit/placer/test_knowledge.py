"""What the placer remembers of its workers between two looks."""

from __future__ import annotations

import msgspec

from services.placer.core.plan import Bind, Plan, Retire, Unbind
from services.placer.core.policy import Policy
from services.placer.knowledge import Knowledge
from shared.control import ModelReport, Report
from shared.layout import Share
from shared.models import Footprint, Manifest
from shared.names import ModelId

A = ModelId("a/1")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def manifest(name="a", **spec):
    return Manifest(
        name=name, version=1, digest="sha256:" + "0" * 64, size_bytes=10, created_at=0.0, **spec
    )


def report(*models, **rest):
    values = {
        "worker": "w1",
        "incarnation": "x",
        "seq": 1,
        "at": 0.0,
        "device_kind": "cpu",
        "device_name": "",
        "budget_bytes": 100,
        "used_bytes": 0,
        "measured_bytes": 0,
        "generation": 1,
    }
    return Report(models=models, **{**values, **rest})


def seen(phase="ready", *, bound=True, size=10, error=None):
    return ModelReport(
        model=A, tier="device", phase=phase, bound=bound, footprint=Footprint(size), error=error
    )


def knowing(*models):
    clock = Clock()
    knowledge = Knowledge(Policy(), clock)
    knowledge.activate(A, manifest(), why="asked")
    knowledge.adopt("w1", {A: "stored"}, 1)
    knowledge.see([report(*models)], {}, clock.now)
    return clock, knowledge


def test_a_worker_without_a_report_is_gone_with_its_bindings():
    """Its models stay active, to be placed elsewhere, with the size it had measured."""
    clock, knowledge = knowing(seen(size=33))
    knowledge.see([], {}, clock.now)
    view = knowledge.view()
    assert not view.workers
    assert knowledge.copies(A) == 0
    assert view.models[A].known == {"cpu": Footprint(33)}


def test_a_failure_counts_for_the_assignment_that_it_speaks_of():
    """Not when the placer has changed its mind since, and only for a while."""
    clock, knowledge = knowing()
    failed = seen("failed", bound=False, error="no zip")
    knowledge.generations["w1"] = 2
    knowledge.see([report(failed)], {}, clock.now)
    assert not knowledge.view().workers["w1"].failed
    knowledge.see([report(failed, generation=2)], {}, clock.now)
    assert knowledge.view().workers["w1"].failed == {A: "no zip"}
    clock.now += Policy().retry_failed_s + 1
    knowledge.see([report(generation=2)], {}, clock.now)
    assert not knowledge.view().workers["w1"].failed


def test_a_worker_that_is_too_full_has_not_failed():
    """It measured more than was planned with; that is for the plan to put right."""
    clock, knowledge = knowing()
    failed = seen("failed", bound=False, size=120, error="no room")
    knowledge.see([report(failed)], {}, clock.now)
    assert not knowledge.view().workers["w1"].failed


def test_an_engine_that_restarts_keeps_its_bindings_for_a_while():
    """It gets nothing new at once, and counts as away only later."""
    clock, knowledge = knowing(seen())
    down = report(engine_up=False)
    knowledge.see([down], {}, clock.now)
    worker = knowledge.view().workers["w1"]
    assert (worker.takes_new, worker.serves, worker.budget_bytes) == (False, True, 0)
    clock.now += Policy().engine_grace_s
    assert not knowledge.view().workers["w1"].serves


def test_waiting_ends_when_somebody_consumes_or_nothing_waits():
    """A depth that was asked for before the request was forwarded does not count."""
    clock, knowledge = knowing()
    knowledge.wait(A)
    knowledge.see([report()], {A: 0}, clock.now - 1)
    assert knowledge.view().models[A].waiting
    knowledge.see([report()], {A: 0}, clock.now + 1)
    assert not knowledge.view().models[A].waiting
    knowledge.wait(A)
    knowledge.see([report(seen())], {}, clock.now)
    assert not knowledge.view().models[A].waiting


def test_who_may_hold_messages_of_a_queue():
    """Who consumes it, holds some, or has not yet been seen to follow its last assignment."""
    clock, knowledge = knowing(seen())

    def in_hand(*models, **rest):
        knowledge.see([report(*models, **rest)], {}, clock.now)
        return knowledge.in_hand(A)

    assert in_hand(seen()) == ["w1"]
    held = msgspec.structs.replace(seen(bound=False), held=1)
    assert in_hand(held) == ["w1"]
    assert in_hand(seen(bound=False)) == []
    knowledge.generations["w1"] = 2
    assert in_hand() == ["w1"]
    assert in_hand(generation=2) == []
    knowledge.see([], {}, clock.now)
    assert knowledge.in_hand(A) == []


def test_commit_keeps_count_and_ignores_what_is_gone():
    """A plan may speak of workers and models that went while it was made."""
    _, knowledge = knowing()
    b = knowledge.activate(ModelId("b/1"), manifest("b"), why="asked")
    assert b.manifest is not None
    touched = knowledge.commit(
        Plan(
            bind=(
                Bind(ModelId("b/1"), "w1", "asked"),
                Bind(ModelId("b/1"), "gone", "asked"),
                Bind(ModelId("c/1"), "w1", "asked"),
            ),
            unbind=(Unbind(A, "w1", "room"), Unbind(A, "gone", "room")),
            retire=(Retire(A, "idle"),),
        )
    )
    assert touched == {"w1"}
    assert knowledge.bindings() == [("b/1", 1)]
    assert A in knowledge.retiring
    revived = knowledge.activate(A, None, why="asked again")
    assert revived.manifest is not None
    assert A not in knowledge.retiring


def test_only_the_default_version_is_kept_warm():
    """min_copies of an older version ends when a newer one takes the name."""
    clock = Clock()
    knowledge = Knowledge(Policy(), clock)
    knowledge.activate(A, manifest(min_copies=1), why="asked")
    knowledge.defaults["a"] = 1
    assert knowledge.view().models[A].min_copies == 1
    knowledge.defaults["a"] = 2
    assert knowledge.view().models[A].min_copies == 0


def test_events_are_bounded():
    """A story of what happened lately, not of everything."""
    knowledge = Knowledge(Policy(), Clock())
    for number in range(5000):
        knowledge.note("something", str(number))
    assert len(knowledge.history.events) == 1000
    assert msgspec.json.encode(list(knowledge.history.events))


def test_a_worker_shows_whether_it_shares():
    """Until it has told of a model that has something in common with others, it is taken to."""
    shares = (Share("backbone", 8),)
    _, knowledge = knowing()
    assert knowledge.view().workers["w1"].shares
    knowledge.active[A].estimate = Footprint(10, measured=False, shares=shares)
    knowledge.see([report(seen())], {}, 100.0)
    assert not knowledge.view().workers["w1"].shares
    sharing = msgspec.structs.replace(seen(), footprint=Footprint(10, shares=shares))
    knowledge.see([report(sharing)], {}, 100.0)
    assert knowledge.view().workers["w1"].shares
