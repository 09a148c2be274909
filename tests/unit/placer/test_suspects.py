"""A model that seems to have ended an engine as it was loaded: tried where it was, nowhere else."""

from __future__ import annotations

import msgspec
import pytest

from services.placer.core.plan import plan
from services.placer.core.policy import Policy
from services.placer.knowledge import Knowledge
from shared.control import ModelReport, Report
from shared.models import Footprint, Manifest
from shared.names import ModelId

POLICY = Policy()
A, B = ModelId("a/1"), ModelId("b/1")


class Fleet:
    """Two workers with an engine, of which the first is to load `A`, which waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.knowledge = Knowledge(POLICY, lambda: self.now)
        for model in (A, B):
            name = model.partition("/")[0]
            manifest = Manifest(
                name=name, version=1, digest="sha256:" + "0" * 64, size_bytes=10, created_at=0.0
            )
            self.knowledge.activate(model, manifest, why="asked")
        for name in ("w1", "w2"):
            self.knowledge.adopt(name, {A: "stored"} if name == "w1" else {}, 1)
        self.tell()

    def tell(self, suspect: str = "", *, gone: str = "", **header: object) -> None:
        """Both report; `suspect` suspects `A`."""
        self.now += 0.2
        reports = [self.report(name, suspect=name == suspect) for name in ("w1", "w2")]
        reports = [msgspec.structs.replace(each, **header) for each in reports]
        self.knowledge.see([each for each in reports if each.worker != gone], {}, self.now)

    def report(self, name: str, *, suspect: bool) -> Report:
        told = ModelReport(
            model=A, tier="disk", phase="loading", bound=False, footprint=Footprint(10),
            suspect=suspect,
        )  # fmt: skip
        return Report(
            worker=name, incarnation="x", seq=int(self.now * 10), at=self.now, device_kind="cpu",
            device_name="", budget_bytes=100, used_bytes=0, measured_bytes=0, generation=1,
            models=(told,) if name == "w1" or suspect else (),
        )  # fmt: skip

    def kept_from(self, model: ModelId) -> set[str]:
        workers = self.knowledge.view().workers
        return {name for name, each in workers.items() if model in each.failed}


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_no_other_worker_is_given_it(fleet):
    """While it is tried again, though it is asked and its worker's engine is down; everything else
    may go there."""
    fleet.tell(suspect="w1")
    assert fleet.kept_from(A) == {"w2"}
    assert fleet.kept_from(B) == set()
    fleet.knowledge.wait(A)
    decided = plan(fleet.knowledge.view(), POLICY)
    assert A not in {new.model for new in decided.bind}
    assert A not in {gone.model for gone in decided.unbind}


@pytest.mark.parametrize("how", [{}, {"gone": "w1"}], ids=["it was not it", "its worker is gone"])
def test_it_is_as_before_once_nobody_suspects_it(fleet, how):
    """Loaded alone it was innocent; or nobody is there who tries it."""
    fleet.tell(suspect="w1")
    fleet.tell(**how)
    assert fleet.kept_from(A) == set()


def test_whoever_has_it_keeps_it(fleet):
    """It serves there: another worker's suspicion takes nothing away."""
    fleet.tell(suspect="w2")
    assert fleet.knowledge.view().workers["w1"].assigned.keys() == {A}
    assert fleet.kept_from(A) == set()


def test_nobody_is_suspected_for_ever(fleet):
    """An engine that never comes back says nothing of its last model."""
    for _ in range(round(POLICY.retry_failed_s / 0.2) - 1):
        fleet.tell(suspect="w1")
    assert fleet.kept_from(A) == {"w2"}
    for _ in range(3):
        fleet.tell(suspect="w1")
    assert fleet.kept_from(A) == set()
