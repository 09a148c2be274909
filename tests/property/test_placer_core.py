"""The laws of the placer's decision, on fleets of any shape."""

from __future__ import annotations

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.placer.core.changes import applied
from services.placer.core.fleet import Fleet
from services.placer.core.plan import place_one, plan
from services.placer.core.policy import Policy
from services.placer.core.verify import verify
from services.placer.core.view import (
    Binding,
    Demand,
    FleetSince,
    ModelView,
    Pace,
    View,
    WorkerView,
    copies,
    residents,
)
from shared.control import ModelReport
from shared.fit import can_be_served, used_bytes
from shared.layout import Share
from shared.models import Footprint, Placement
from shared.names import ModelId

NOW = 1000.0
POLICY = Policy()
PLACEMENTS = (
    *[Placement()] * 4,
    Placement(worker_selector={"zone": "a"}),
    Placement(spread_by="zone"),
    Placement(alone=True),
)


def model_views(model: ModelId) -> st.SearchStrategy[ModelView]:
    demands = st.builds(
        Demand,
        ready=st.sampled_from([0, 0, 0, 3, 500]),
        held=st.sampled_from([0, 0, 0, 1, 32]),
        need=st.sampled_from([0.0, 0.0, 0.01, 0.3, 0.69, 0.71, 1.4, 3.0, 20.0]),
        last_active=st.sampled_from([NOW, NOW - 0.5, NOW - 5, NOW - 100, NOW - 700]),
        rate_slow=st.sampled_from([0.0, 0.0, 1.0, 30.0]),
        seconds_per_item=st.sampled_from([0.0, 0.01]),
    )

    def build(demand: Demand, size: int, low: int, high: int | None, **rest: object) -> ModelView:
        if high is not None:
            low = min(low, high)
        stateful = bool(rest["stateful"])
        return ModelView(
            model=model,
            demand=demand,
            size_bytes=size,
            min_copies=min(low, 1) if stateful else low,
            max_copies=high,
            **rest,
        )

    return st.builds(
        build,
        demand=demands,
        size=st.integers(1, 60),
        low=st.sampled_from([0, 0, 0, 1, 2]),
        high=st.sampled_from([None, None, 1, 2]),
        stateful=st.sampled_from([False, False, False, True]),
        priority=st.sampled_from([0, 0, 1]),
        waiting=st.sampled_from([False, False, True]),
        load_seconds=st.sampled_from([0.0, 0.3, 2.0]),
        low_since=st.sampled_from([None, NOW - 1, NOW - 100]),
        placement=st.sampled_from(PLACEMENTS),
    )


@st.composite
def footprints(draw: st.DrawFn) -> Footprint:
    weights = draw(st.integers(0, 70))
    shares = tuple(
        Share(key, nbytes)
        for key, nbytes in (("a", 5), ("b", 20))
        if weights >= 25 and draw(st.booleans())
    )
    pinned = draw(st.sampled_from([False, False, False, True]))
    return Footprint(weights, draw(st.integers(0, 10)), draw(st.booleans()), shares, pinned)


@st.composite
def worker_views(draw: st.DrawFn, name: str, models: list[ModelId]) -> WorkerView:
    assigned = {
        model: Binding(
            draw(st.sampled_from([NOW, NOW - 1, NOW - 30, NOW - 500])),
            spare=draw(st.sampled_from([False, False, True])),
        )
        for model in draw(st.sets(st.sampled_from(models), max_size=6))
    }
    reported = {}
    for model in draw(st.sets(st.sampled_from(models), max_size=8)):
        reported[model] = ModelReport(
            model=model,
            tier=draw(st.sampled_from(["disk", "host", "device"])),
            phase="ready",
            bound=draw(st.booleans()),
            footprint=draw(footprints()),
            saturated=draw(st.booleans()),
        )
    draining = draw(st.sampled_from([False, False, False, True]))
    engine_up = draw(st.sampled_from([True, True, True, False]))
    return WorkerView(
        worker=name,
        budget_bytes=draw(st.integers(40, 200)) if engine_up else 0,
        host_bytes=draw(st.sampled_from([0, 0, 30, 300])) if engine_up else 0,
        takes_new=engine_up and not draining,
        serves=not draining and (engine_up or draw(st.booleans())),
        assigned=assigned,
        reported=reported,
        failed=dict.fromkeys(
            draw(st.sets(st.sampled_from(models), max_size=1)), "cannot be parsed"
        ),
        labels={"zone": draw(st.sampled_from(["a", "b"]))},
        copied_s=draw(st.sampled_from([0.0, 0.0, 2.9, 5.0])),
        slowness=draw(st.sampled_from([1.0, 1.0, 2.0])),
    )


@st.composite
def views(draw: st.DrawFn) -> View:
    ids = [ModelId(f"m{n}/1") for n in range(draw(st.integers(1, 10)))]
    active = draw(st.sets(st.sampled_from(ids), min_size=1))
    workers = [f"w{n}" for n in range(draw(st.integers(0, 5)))]
    return View(
        at=NOW,
        workers={name: draw(worker_views(name, ids)) for name in workers},
        models={model: draw(model_views(model)) for model in sorted(active)},
        fleet_since=FleetSince(draw(st.none() | st.just(NOW - 50.0))),
        pace=Pace(balanced=draw(st.sampled_from([None, NOW - 0.1, NOW - 2.0]))),
    )


def used(view: View, worker: WorkerView) -> int:
    return used_bytes(residents(worker, worker.assigned, view.models))


def served(view: View, worker: WorkerView) -> bool:
    assigned = residents(worker, worker.assigned, view.models)
    return can_be_served(assigned, worker.budget_bytes, worker.host_bytes)


def asked(view: View, model: ModelId) -> bool:
    facts = view.models.get(model)
    return facts is not None and (facts.waiting or facts.demand.backlog > 0)


@given(views())
@settings(max_examples=80, deadline=None)
def test_planning_again_right_after_applying_changes_nothing(view: View) -> None:
    """A plan is complete: there is nothing left to do, and nothing to take back."""
    first = plan(view, POLICY)
    again = plan(applied(view, first), POLICY)
    assert not again.changes, f"{first}\nthen {again}"


@given(views())
@settings(max_examples=80, deadline=None)
def test_no_worker_is_planned_over_its_budget(view: View) -> None:
    """Every worker can serve what is assigned to it, measured sizes included."""
    after = applied(view, plan(view, POLICY))
    for worker in after.workers.values():
        if worker.budget_bytes:
            assert served(after, worker) or not worker.assigned


@given(views())
@settings(max_examples=80, deadline=None)
def test_limits_of_copies_and_of_workers_are_kept(view: View) -> None:
    """Nothing new comes to a worker that leaves; no model has more copies than it may, and the
    number wanted is at least one."""
    decided = plan(view, POLICY)
    after = applied(view, decided)
    for new in decided.bind:
        assert view.workers[new.worker].takes_new
        assert new.model not in view.workers[new.worker].assigned
        assert new.model not in view.workers[new.worker].failed
    serving = sum(worker.serves for worker in view.workers.values())
    for model, count in copies(after).items():
        facts = after.models.get(model)
        assert facts is not None, f"{model} is assigned and not active"
        assert count <= facts.copies_limit(serving)
    assert decided.wanted.workers >= 1


@given(views())
@settings(max_examples=80, deadline=None)
def test_what_waits_is_placed_retired_with_an_answer_or_refused_with_a_reason(view: View) -> None:
    """No request waits without anybody knowing why."""
    decided = plan(view, POLICY)
    after = applied(view, decided)
    assigned = {m for worker in after.workers.values() for m in worker.assigned}
    refused = {no.model for no in decided.refused}
    for model in view.models:
        if asked(view, model) and model not in assigned:
            assert model in refused
            for gone in decided.retire:
                assert gone.model != model or gone.code is not None


@given(views(), st.data())
@settings(max_examples=80, deadline=None)
def test_a_spike_changes_no_bindings_of_others_unless_memory_forces_it(
    view: View, data: st.DataObject
) -> None:
    """After a plan the fleet is at rest. When one model's demand then jumps, only its bindings
    change; others only lose some to make room, and only idle or surplus ones. (Later others may
    leave a worker that is asked too much: a law of its own, below.)"""
    settled = applied(view, plan(view, POLICY))
    assume(settled.models)
    spiking = data.draw(st.sampled_from(sorted(settled.models)))
    facts = settled.models[spiking]
    demand = msgspec.structs.replace(facts.demand, need=facts.demand.need + 5.0, ready=1000)
    demand = msgspec.structs.replace(demand, last_active=NOW)
    spiked = {**settled.models, spiking: msgspec.structs.replace(facts, demand=demand)}
    decided = plan(msgspec.structs.replace(settled, models=spiked), POLICY)
    assert all(new.model == spiking for new in decided.bind)
    for gone in decided.unbind:
        assert gone.model == spiking or gone.reason.endswith(f"room for {spiking}")
        if gone.model != spiking and asked(settled, gone.model):
            other = settled.models[gone.model]
            left = copies(applied(settled, decided)).get(gone.model, 0)
            assert other.demand.need <= POLICY.target_utilization * left


@given(views())
@settings(max_examples=80, deadline=None)
def test_only_a_worker_that_is_asked_too_much_is_left_by_a_move(view: View) -> None:
    """A move is the one change that no memory, no new demand and no idleness forces: its source is
    asked for more than the target, and what moves keeps its binding until the other consumes."""
    decided = plan(view, POLICY)
    after = applied(view, decided)
    begun = [move for move in decided.pace.moves if move not in view.pace.moves]
    assert len(begun) <= POLICY.moves_at_once
    before = Fleet(applied(view, msgspec.structs.replace(decided, bind=())), POLICY)
    for move in begun:
        assert before.busy[before.number[move.source]] > POLICY.target_utilization
        assert move.model in after.workers[move.source].assigned
        assert move.model in after.workers[move.target].assigned


@given(views(), st.data())
@settings(max_examples=80, deadline=None)
def test_the_reflex_places_one_copy_within_the_same_laws(view: View, data: st.DataObject) -> None:
    """One binding or a refusal, never over a budget, and only idle models make room."""
    model = data.draw(st.sampled_from(sorted(view.models)))
    held = copies(view).get(model, 0)
    decided = place_one(view, model, POLICY)
    assert len(decided.bind) + len(decided.refused) == (0 if held else 1)
    after = applied(view, decided)
    for new in decided.bind:
        worker = after.workers[new.worker]
        assert served(after, worker)
    for gone in decided.unbind:
        assert gone.model != model
        assert not asked(view, gone.model) or copies(after).get(gone.model, 0) >= 1


@given(views(), views())
@settings(max_examples=80, deadline=None)
def test_a_plan_for_yesterday_breaks_nothing_today(old: View, fresh: View) -> None:
    """What verification lets through keeps the budgets of the fresh view, whatever view the
    plan was made on."""
    kept, _ = verify(plan(old, POLICY), fresh)
    after = applied(fresh, kept)
    for name, worker in after.workers.items():
        before = used(fresh, fresh.workers[name])
        assert served(after, worker) or used(after, worker) <= before
    for gone in kept.retire:
        assert all(gone.model not in worker.assigned for worker in after.workers.values())


@given(views())
@settings(max_examples=80, deadline=None)
def test_a_plan_passes_its_own_verification(view: View) -> None:
    """Nothing is refused when nothing has changed meanwhile."""
    decided = plan(view, POLICY)
    kept, refused = verify(decided, view)
    assert not refused
    assert (kept.bind, kept.unbind, kept.retire) == (decided.bind, decided.unbind, decided.retire)
