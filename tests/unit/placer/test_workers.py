"""What the placer takes from its workers' reports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.placer.core.demand import DemandTracker
from services.placer.core.policy import Policy
from services.placer.history import History
from services.placer.picture import Active
from services.placer.workers import Workers
from shared.control import ModelReport, Report
from shared.models import Footprint
from shared.names import ModelId

A, B = ModelId("a/1"), ModelId("b/1")
NOW = 100.0


class Rig:
    def __init__(self) -> None:
        self.active = {A: Active(None)}
        self.generations: dict[str, int] = {}
        self.history = History()
        policy = Policy()
        self.workers = Workers(
            DemandTracker(policy), policy, self.history, self.active, {}, self.generations
        )

    def see(self, *reports: Report) -> set[str]:
        return self.workers.see(reports, NOW)


def report(worker: str, *models: ModelReport, kind: str = "cpu", seq: int = 1) -> Report:
    return Report(
        worker=worker,
        incarnation="x",
        seq=seq,
        at=0.0,
        device_kind=kind,
        device_name="",
        budget_bytes=100,
        used_bytes=0,
        measured_bytes=0,
        generation=1,
        models=models,
    )


def told(model=A, *, size=10, bound=True, measured=True) -> ModelReport:
    return ModelReport(
        model=model,
        tier="device",
        phase="ready",
        bound=bound,
        footprint=Footprint(size, measured=measured),
    )


def test_who_is_gone_is_told_once_and_leaves_nothing():
    """Whether it was to leave or not, what it consumed and what it told go with it."""
    rig = Rig()
    rig.see(report("w1", told()), report("w2", told()))
    assert rig.workers.leave("w1")
    assert rig.see(report("w2", told(), seq=2)) == {"w1"}
    assert rig.see(report("w2", told(), seq=3)) == set()
    assert rig.workers.consumers.by_model == {A: ["w2"]}
    assert rig.workers.reported.keys() == {"w2"}
    assert not rig.workers.leaving
    assert [(event.what, event.worker) for event in rig.history.events] == [("worker left", "w1")]


def test_leaving_is_asked_and_taken_back_once():
    """The second time says that nothing has changed."""
    rig = Rig()
    rig.see(report("w1"))
    assert [rig.workers.leave("w1"), rig.workers.leave("w1")] == [True, False]
    assert [rig.workers.stay("w1"), rig.workers.stay("w1")] == [True, False]


def test_a_size_that_was_measured_holds_for_the_kind_of_device():
    """Not one that was guessed, nor of a model that nobody asked for, and the newest counts."""
    rig = Rig()
    rig.see(report("w1", told(size=5, measured=False), told(B)))
    assert rig.active[A].known == {}
    rig.see(report("w1", told(size=6), seq=2), report("w2", told(size=7), kind="t4"))
    assert rig.active[A].known == {"cpu": Footprint(6), "t4": Footprint(7)}
    rig.see(report("w1", told(size=8), seq=3))
    assert rig.active[A].known == {"cpu": Footprint(8), "t4": Footprint(7)}


reported = st.dictionaries(
    st.sampled_from(["w1", "w2", "w3"]),
    st.dictionaries(st.sampled_from([A, B]), st.booleans()),
)


@given(st.lists(reported, max_size=6))
def test_what_is_known_of_workers_is_what_they_told_last(looks):
    """However they came and went."""
    rig = Rig()
    before: set[str] = set()
    for seq, look in enumerate(looks, 1):
        reports = [
            report(worker, *(told(model, bound=bound) for model, bound in models.items()), seq=seq)
            for worker, models in look.items()
        ]
        assert rig.see(*reports) == before - look.keys()
        before = set(look)
        assert rig.workers.reports.keys() == rig.workers.reported.keys() == before
        assert {worker: set(models) for worker, models in rig.workers.reported.items()} == {
            worker: set(models) for worker, models in look.items()
        }
        bound = {(m, w) for w, models in look.items() for m in models if models[m]}
        consumers = rig.workers.consumers.by_model
        assert {(m, w) for m, workers in consumers.items() for w in workers} == bound
