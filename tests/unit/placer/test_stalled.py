"""What an engine that is down, or a worker that has gone silent, means for who is asked there."""

from __future__ import annotations

import msgspec
import pytest

from services.placer.core.changes import applied
from services.placer.core.plan import plan
from services.placer.core.policy import Policy
from services.placer.core.view import Binding, Demand, ModelView, View, WorkerView
from services.placer.knowledge import Knowledge
from shared.control import ModelReport, Report
from shared.models import Footprint, Manifest
from shared.names import ModelId

NOW = 1000.0
POLICY = Policy()
A, B = ModelId("a/1"), ModelId("b/1")


def model(name=A, *, held=0, **facts):
    demand = Demand(held=held, last_active=NOW - (0 if held else 5), **facts.pop("demand", {}))
    return ModelView(model=name, size_bytes=10, demand=demand, **facts)


def stalled(name, *assigned):
    return WorkerView(
        worker=name,
        budget_bytes=0,
        takes_new=False,
        stalled=True,
        assigned={each: Binding(NOW - 100) for each in assigned},
    )


def well(name, *assigned):
    return WorkerView(
        worker=name,
        budget_bytes=100,
        assigned={each: Binding(NOW - 100) for each in assigned},
    )


def view(workers, models):
    return View(
        at=NOW,
        workers={each.worker: each for each in workers},
        models={each.model: each for each in models},
    )


def test_what_is_asked_is_placed_again_at_once_and_the_idle_waits():
    """The worker that stalls keeps both bindings: it may be back soon."""
    before = view([stalled("w1", A, B), well("w2")], [model(A, held=1), model(B)])
    decided = plan(before, POLICY)
    assert [(new.model, new.worker) for new in decided.bind] == [(A, "w2")]
    assert not decided.unbind
    assert not decided.retire
    assert not plan(applied(before, decided), POLICY).changes


def test_what_will_be_asked_before_it_is_back_does_not_wait_either():
    """A request in two seconds, on the fast average, is one that would wait."""
    often, seldom = {"rate_fast": 0.5}, {"rate_fast": 0.1}
    models = [model(A, demand=often), model(B, demand=seldom)]
    decided = plan(view([stalled("w1", A, B), well("w2")], models), POLICY)
    assert [new.model for new in decided.bind] == [A]


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"load_seconds": 20.0}, "its worker is back before it would be loaded elsewhere"),
        ({"stateful": True}, "its state is on that worker"),
        ({"max_copies": 1}, "there may be one"),
    ],
)
def test_what_waits_for_its_worker(facts, why):
    """Though it is asked."""
    before = view([stalled("w1", A), well("w2")], [model(A, held=1, **facts)])
    assert not plan(before, POLICY).changes, why


def test_what_has_stalled_two_workers_is_taken_to_no_third():
    """It may be what kills their engines."""
    before = view([stalled("w1", A), stalled("w2", A), well("w3")], [model(A, held=1)])
    assert not plan(before, POLICY).changes


def test_a_worker_that_is_back_has_its_copy_still_and_the_other_goes_later():
    """Nothing is done when it comes back; the copy that helped out is one too many in time."""
    asked = model(A, held=1)
    both = view([well("w1", A), well("w2", A)], [asked])
    assert not plan(both, POLICY).changes
    newer = {
        **both.workers,
        "w2": msgspec.structs.replace(well("w2"), assigned={A: Binding(NOW - 30)}),
    }
    late = msgspec.structs.replace(
        both, workers=newer, models={A: msgspec.structs.replace(asked, low_since=NOW - 30)}
    )
    assert [(gone.model, gone.worker) for gone in plan(late, POLICY).unbind] == [(A, "w2")]


# --- silence ---


class Workers:
    """Three that report every 0.2 s, but those of `silent`."""

    def __init__(self):
        self.now = NOW
        self.silent: set[str] = set()
        self.knowledge = Knowledge(POLICY, lambda: self.now)
        manifest = Manifest(
            name="a", version=1, digest="sha256:" + "0" * 64, size_bytes=10, created_at=0.0
        )
        self.knowledge.activate(A, manifest, why="asked")
        self.reports = {name: self.report(name) for name in ("w1", "w2", "w3")}
        for name in self.reports:
            self.knowledge.adopt(name, {A: "stored"} if name == "w1" else {}, 1)
        self.look()

    def report(self, name):
        held = ModelReport(
            model=A, tier="device", phase="ready", bound=True, footprint=Footprint(10), held=1
        )
        return Report(
            worker=name, incarnation="x", seq=int(self.now * 10), at=self.now, device_kind="cpu",
            device_name="", budget_bytes=100, used_bytes=0, measured_bytes=0, generation=1,
            models=(held,) if name == "w1" else (),
        )  # fmt: skip

    def look(self):
        for name in self.reports.keys() - self.silent:
            self.reports[name] = self.report(name)
        self.knowledge.see(self.reports.values(), {}, self.now)

    def run(self, seconds):
        for _ in range(round(seconds / 0.2)):
            self.now += 0.2
            self.look()

    @property
    def stalled(self):
        return {name for name, each in self.knowledge.view().workers.items() if each.stalled}


def test_what_is_asked_of_a_worker_that_goes_silent_gets_another_copy():
    """Long before its report ends; its own copy stays its own, in case it was only slow."""
    fleet = Workers()
    fleet.silent = {"w1"}
    fleet.run(1.0)
    assert not fleet.stalled
    fleet.run(0.4)
    assert fleet.stalled == {"w1"}
    decided = plan(fleet.knowledge.view(), POLICY)
    assert [new.model for new in decided.bind] == [A]
    assert not decided.unbind
    fleet.silent = set()
    fleet.run(0.2)
    assert not fleet.stalled
    whats = [event.what for event in fleet.knowledge.history.events]
    assert whats[-2:] == ["worker is silent", "worker is heard again"]


def test_when_most_are_silent_it_is_nobodys_fault():
    """The store stands still, or its connection: three copies more would help nobody."""
    fleet = Workers()
    fleet.silent = {"w1", "w2"}
    fleet.run(2.0)
    assert not fleet.stalled


def test_a_placer_that_stood_still_blames_nobody():
    """It has not listened itself."""
    fleet = Workers()
    fleet.silent = {"w1"}
    fleet.run(0.8)
    fleet.now += 5.0
    fleet.look()
    assert not fleet.stalled
    fleet.run(1.4)
    assert fleet.stalled == {"w1"}
