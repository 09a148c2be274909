"""What becomes of workers that are asked too much where one model surges."""

from __future__ import annotations

import msgspec

from services.placer.core.plan import plan
from services.placer.core.view import Demand, ModelView, View
from shared.names import ModelId
from tests.unit.placer.test_plan import (
    NOW,
    POLICY,
    binds,
    model,
    report,
    unbinds,
    view,
    worker,
)

STAY = POLICY.neighbours_stay_s


def surging(*, need: float = 1.0, **facts: int) -> ModelView:
    """It has the two copies that it needs; a tenth of that is its usual traffic."""
    demand = Demand(
        need=need, rate_fast=100 * need, rate_slow=10.0, seconds_per_item=0.01,
        held=1, last_active=NOW,
    )  # fmt: skip
    return msgspec.structs.replace(model("surging", **facts), demand=demand)


def beside(surge: ModelView, *idle: str) -> View:
    """Two of its neighbours are on w1 with it; nobody but `idle` is on w3."""
    neighbours = ("a", "b")
    fleet = [
        worker("w1", "surging", *neighbours, reports=[
            report(name, bound=True) for name in ("surging", *neighbours)
        ]),
        worker("w2", "surging", reports=[report("surging", bound=True)]),
        worker("w3", *idle, budget=10),
    ]  # fmt: skip
    return view(
        fleet,
        [
            surge,
            *(model(name, need=0.25, held=1) for name in neighbours),
            *(model(name, idle_s=50.0) for name in idle),
        ],
    )


def later(before: View, seconds: float, **changed: object) -> View:
    return msgspec.structs.replace(before, at=before.at + seconds, **changed)


def test_what_surges_gets_one_more_copy_and_its_neighbours_stay():
    """Though it has the copies that it needs: who has time takes more of its queue."""
    decided = plan(beside(surging()), POLICY)
    assert binds(decided) == {("surging", "w3")}
    assert "w1 is asked for 100%" in decided.bind[0].reason
    assert not decided.unbind


def test_one_more_copy_than_needed_makes_nobody_make_room():
    """Not even an idle model."""
    assert not plan(beside(surging(), "idle"), POLICY).changes


def test_neighbours_leave_a_worker_that_stays_too_hot():
    """When what surges can have no more copies, or they do not help."""
    before = beside(surging(max_copies=2))
    first = plan(before, POLICY)
    assert not first.changes
    assert first.pace.hot == {"w1": NOW}
    second = plan(later(before, STAY - 0.5, pace=first.pace), POLICY)
    assert not second.changes
    third = plan(later(before, STAY, pace=second.pace), POLICY)
    [(moved, target)] = binds(third)
    assert moved in {"a", "b"}
    assert target == "w3"
    assert unbinds(third) == set()


def test_a_worker_that_has_cooled_meanwhile_is_hot_anew():
    """Only one that has been asked too much all the time is left by the others."""
    before = beside(surging(max_copies=2))
    first = plan(before, POLICY)
    calm = {**before.models, ModelId("surging/1"): surging(need=0.3, max_copies=2)}
    second = plan(later(before, STAY / 2, pace=first.pace, models=calm), POLICY)
    assert second.pace.hot == {}
    third = plan(later(before, STAY, pace=second.pace), POLICY)
    assert not third.changes
    assert third.pace.hot == {"w1": NOW + STAY}
