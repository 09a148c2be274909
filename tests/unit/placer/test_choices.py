"""Where copies may be, who makes room, and what is done where nobody waits."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from services.placer.core.changes import applied
from services.placer.core.fleet import Fleet
from services.placer.core.plan import place_one, plan
from services.placer.core.policy import Policy
from services.placer.core.victims import Victims
from services.placer.core.view import Binding, Demand, Move, View, WorkerView
from shared.models import Footprint, Placement
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


def placed(name, *, selector=None, spread_by=None, **facts):
    placement = Placement(worker_selector=selector or {}, spread_by=spread_by)
    return model(name, placement=placement, **facts)


def traffic(name, *, need, slow, **facts):
    """A model with so much demand now, and so much as a rule (device s/s)."""
    seconds = 0.01
    demand = Demand(
        need=need, rate_fast=need / seconds, rate_slow=slow / seconds, seconds_per_item=seconds,
        held=1, last_active=NOW,
    )  # fmt: skip
    return msgspec.structs.replace(model(name, **facts), demand=demand)


def zoned(name, zone, *assigned, **rest):
    return worker(name, *assigned, labels={"zone": zone, "worker": name}, **rest)


def test_a_model_goes_only_where_the_labels_are_that_it_asks_for():
    """And is taken from where they are not; also a busy worker that has them is chosen."""
    fleet = [zoned("w1", "a"), zoned("w2", "b", "busy"), zoned("w3", "a", "pinned")]
    models = [
        model("busy", need=0.6, held=1),
        placed("a", selector={"zone": "b"}, waiting=True),
        placed("pinned", selector={"worker": "w1"}),
    ]
    decided = plan(view(fleet, models), POLICY)
    assert binds(decided) == {("a", "w2"), ("pinned", "w1")}
    assert unbinds(decided) == {("pinned", "w3")}
    assert not plan(applied(view(fleet, models), decided), POLICY).changes


def test_a_selector_that_no_worker_matches_is_refused_for_good():
    """With the labels, so that whoever waits is told at once; more workers are not wanted."""
    a = placed("a", selector={"zone": "c"}, waiting=True)
    decided = plan(view([zoned("w1", "a")], [a]), POLICY)
    [no] = place_one(view([zoned("w1", "a")], [a]), a.model, POLICY).refused
    assert (no.kind, no.permanent) == ("no_match", True)
    assert str(no.refusal) == "none of 1 workers has the labels zone=c"
    assert [gone.code for gone in decided.retire] == ["unavailable"]
    assert decided.wanted.workers == 1


def test_copies_are_spread_by_a_label():
    """Never two in one zone; the refusal of a third says so."""
    fleet = [zoned("w1", "a"), zoned("w2", "a"), zoned("w3", "b")]
    a = placed("a", spread_by="zone", need=3.0, held=9)
    decided = plan(view(fleet, [a]), POLICY)
    zones = {next(w for w in fleet if w.worker == b.worker).labels["zone"] for b in decided.bind}
    assert (len(decided.bind), zones) == (2, {"a", "b"})
    [no] = plan(applied(view(fleet, [a]), decided), Policy(step_up_min=5)).refused
    assert no.kind == "spread"


def test_the_least_regretted_of_the_idle_makes_room():
    """What is asked often, as a rule, and slow to load costs more than what was asked lately."""
    often = msgspec.structs.replace(
        model("often", load_seconds=0.1),
        demand=Demand(rate_slow=5.0, last_active=NOW - 50),
    )
    seldom = msgspec.structs.replace(
        model("seldom", load_seconds=0.1),
        demand=Demand(rate_slow=0.1, last_active=NOW - 2),
    )
    fleet = [worker("w1", "often", "seldom", budget=25)]
    decided = plan(view(fleet, [often, seldom, model("new", waiting=True)]), POLICY)
    assert unbinds(decided) == {("seldom", "w1")}


def test_a_request_or_two_are_no_traffic():
    """Then nothing is known but which was asked last, and the other one goes."""
    once = msgspec.structs.replace(
        model("once", load_seconds=0.1),
        demand=Demand(rate_slow=1 / POLICY.slow_tau_s, last_active=NOW - 50),
    )
    later = msgspec.structs.replace(
        model("later", load_seconds=0.1), demand=Demand(last_active=NOW - 5)
    )
    fleet = [worker("w1", "once", "later", budget=25)]
    decided = plan(view(fleet, [once, later, model("new", waiting=True)]), POLICY)
    assert unbinds(decided) == {("once", "w1")}


def test_room_is_made_where_it_costs_least():
    """Among workers that are otherwise alike; the alternatives are told with their scores."""
    often = msgspec.structs.replace(
        model("often"), demand=Demand(rate_slow=5.0, last_active=NOW - 50)
    )
    fleet = [worker("w1", "often", budget=15), worker("w2", "dead", budget=15)]
    models = [often, model("dead", idle_s=500), model("new", waiting=True)]
    decided = plan(view(fleet, models), POLICY)
    assert unbinds(decided) == {("dead", "w2")}
    [new] = decided.bind
    assert [each.worker for each in new.considered] == ["w2", "w1"]


def test_a_further_copy_waits_where_enough_was_loaded_a_first_one_never():
    """With the numbers; another worker takes it if it can."""
    limit = POLICY.load_share * POLICY.load_window_s
    fleet = [
        worker("w1", "a", reports=[report("a", bound=True)]),
        worker("w2", copied_s=limit),
    ]
    a = model("a", need=1.0, held=9)
    decided = plan(view(fleet, [a]), POLICY)
    [no] = decided.refused
    assert (decided.bind, no.kind) == ((), "loading")
    assert "3.0 s" in str(no.refusal)
    assert binds(plan(view([*fleet, worker("w3")], [a]), POLICY)) == {("a", "w3")}
    assert binds(plan(view(fleet[1:], [a]), POLICY)) == {("a", "w2")}


@pytest.mark.parametrize("full", [False, True])
def test_a_spike_has_its_second_copy_in_one_tick(full):
    """Also when idle models must make room for it."""
    others = [f"i{n}" for n in range(9 if full else 1)]
    fleet = [
        worker("w1", "hot", reports=[report("hot", bound=True)]),
        worker("w2", *others, budget=95),
    ]
    models = [model(name, idle_s=30) for name in others]
    decided = plan(view(fleet, [model("hot", need=1.3, ready=200), *models]), POLICY)
    assert binds(decided) == {("hot", "w2")}
    assert len(decided.unbind) == int(full)


def test_spare_memory_holds_copies_of_what_is_asked_most():
    """Within what is to stay free; they are no demand for workers, and the first victims."""
    fleet = [worker("w1", "a", "b", reports=[report("a", bound=True), report("b", bound=True)])]
    fleet.append(worker("w2", budget=25))
    models = [traffic("a", need=0.5, slow=0.5), traffic("b", need=0.2, slow=0.2)]
    before = view(fleet, models)
    decided = plan(before, POLICY)
    assert [(b.model, b.worker, b.spare) for b in decided.bind] == [
        ("a/1", "w2", True), ("b/1", "w2", True),
    ]  # fmt: skip
    assert decided.pace.spared == NOW
    after = applied(before, decided)
    assert not plan(after, POLICY).changes
    later = msgspec.structs.replace(after, at=NOW + 0.2)
    newcomer = model("new", waiting=True, size_bytes=15, placement=Placement(
        worker_selector={"worker": "w2"}))  # fmt: skip
    w2 = msgspec.structs.replace(later.workers["w2"], labels={"worker": "w2"})
    crowded = msgspec.structs.replace(
        later,
        models={**later.models, newcomer.model: newcomer},
        workers={**later.workers, "w2": w2},
    )
    asked = plan(crowded, POLICY)
    assert ("new", "w2") in binds(asked)
    assert {worker for _, worker in unbinds(asked)} == {"w2"}


def test_nothing_spare_while_somebody_waits_or_seldom_asks():
    """Neither for a model that has little traffic, nor beside a refusal for want of room."""
    little = traffic("a", need=0.01, slow=0.01)
    fleet = [worker("w1", "a", reports=[report("a", bound=True)]), worker("w2")]
    assert not plan(view(fleet, [little]), POLICY).changes
    much = traffic("a", need=0.5, slow=0.5)
    pinned = {"cpu": Footprint(99, pinned=True)}
    stuck = model("stuck", waiting=True, known=pinned)
    busy = worker("w2", "b", reports=[report("b", bound=True)])
    decided = plan(view([fleet[0], busy], [much, model("b", held=1), stuck]), POLICY)
    assert not decided.bind
    assert decided.refused[0].kind == "no_room"


def uneven(names: str = "abc", *more: WorkerView, need: float = 0.4) -> View:
    reports = [report(name, bound=True) for name in names]
    fleet = [worker("w1", *names, reports=reports), *(more or [worker("w2")])]
    return view(fleet, [model(name, need=need, held=1) for name in names])


def bound_at(before: View, name: str, on: str) -> View:
    """The view once the worker consumes the model's queue."""
    there = msgspec.structs.replace(
        before.workers[on], reported={ModelId(f"{name}/1"): report(name, bound=True)}
    )
    return msgspec.structs.replace(before, workers={**before.workers, on: there})


def test_a_binding_leaves_a_worker_that_is_asked_too_much():
    """At once, whatever the model itself needs: bound there first, and unbound here once that
    consumes."""
    first = plan(uneven(), POLICY)
    [new] = first.bind
    [move] = first.pace.moves
    assert move == Move(new.model, "w1", "w2", NOW)
    assert not first.unbind
    assert "120% asked for" in new.reason
    after = applied(uneven(), first)
    assert not plan(after, POLICY).changes
    name = move.model.removesuffix("/1")
    bound = msgspec.structs.replace(bound_at(after, name, "w2"), at=NOW + 0.1)
    done = plan(bound, POLICY)
    assert unbinds(done) == {(name, "w1")}
    assert [each.done for each in done.pace.moves] == [NOW + 0.1]


def test_what_has_moved_stays_for_a_while():
    """Neither back, nor on, nor as a spare copy where it came from."""
    first = plan(uneven("ab", need=0.6), POLICY)
    name = first.pace.moves[0].model.removesuffix("/1")
    moved = bound_at(applied(uneven("ab", need=0.6), first), name, "w2")
    moved = msgspec.structs.replace(moved, at=NOW + 0.1)
    moved = applied(moved, plan(moved, POLICY))
    for later in (0.3, 1.1, POLICY.move_rest_s):
        assert not plan(msgspec.structs.replace(moved, at=NOW + later), POLICY).changes
    rested = plan(msgspec.structs.replace(moved, at=NOW + 0.1 + POLICY.move_rest_s), POLICY)
    assert not rested.pace.moves


def test_several_bindings_move_at_once_and_none_to_where_it_would_be_as_hot():
    """Until the hottest worker is not clearly hotter than the coolest."""
    decided = plan(uneven("abcdef", worker("w2"), worker("w3")), POLICY)
    assert {b.worker for b in decided.bind} == {"w2", "w3"}
    assert len(decided.bind) == 4


def test_a_move_under_way_frees_no_room_before_its_end():
    """Its two bindings are one copy: who is refused gets what the source had once the target
    consumes."""
    size = {"hot": 60, "small": 30}
    reports = [report(name, bound=True, size=size[name]) for name in size]
    fleet = [worker("w1", *size, reports=reports), worker("w2", budget=35)]
    models = [
        model("hot", need=1.2, held=1, size_bytes=60, max_copies=1),
        model("small", need=0.4, held=1, size_bytes=30),
        model("big", waiting=True, size_bytes=40),
    ]
    before = view(fleet, models)
    first = plan(before, POLICY)
    assert binds(first) == {("small", "w2")}
    assert [move.source for move in first.pace.moves] == ["w1"]
    assert [no.model for no in first.refused] == ["big/1"]
    after = applied(before, first)
    assert not plan(after, POLICY).changes
    later = msgspec.structs.replace(after, at=NOW + POLICY.victim_min_age_s + 20)
    assert not unbinds(place_one(later, ModelId("big/1"), POLICY))
    bound = msgspec.structs.replace(bound_at(after, "small", "w2"), at=NOW + 0.1)
    done = plan(bound, POLICY)
    assert unbinds(done) == {("small", "w1")}
    assert binds(done) == {("big", "w1")}


def test_a_move_does_not_end_by_a_report_from_before_it():
    """The target consumed the queue until lately, and says so still: the same plan again, at the
    same time, is no reason to unbind the source."""
    stale = [report(name, bound=True) for name in "abc"]
    before = uneven("abc", worker("w2", reports=stale))
    first = plan(before, POLICY)
    assert first.pace.moves
    assert not plan(applied(before, first), POLICY).changes


def test_an_idle_model_makes_room_for_one_that_moves():
    """Where the cooler worker is full: what nobody asks for loses its binding, nothing else."""
    full = worker("w2", "idle", budget=15)
    before = uneven("abc", full)
    idle = model("idle", idle_s=30)
    models = {**before.models, idle.model: idle}
    decided = plan(msgspec.structs.replace(before, models=models), POLICY)
    assert {b.worker for b in decided.bind} == {"w2"}
    assert unbinds(decided) == {("idle", "w2")}
    asked = model("idle", held=1)
    models = {**before.models, asked.model: asked}
    assert not plan(msgspec.structs.replace(before, models=models), POLICY).changes


def test_a_fleet_that_suffices_is_left_alone_however_uneven():
    """Nobody suffers from it; and what all are asked alike can go nowhere."""
    assert not plan(uneven(need=0.2), POLICY).changes
    both = [
        worker(f"w{n}", name, reports=[report(name, bound=True)]) for n, name in enumerate("ab")
    ]
    models = [model(name, need=0.69, held=1) for name in "ab"]
    assert not plan(view(both, models), POLICY).changes


def test_a_starving_models_second_copy_waits_for_nothing():
    """Its only copy is asked for more than a device can do: what was loaded lately is no matter."""
    fleet = [
        worker("w1", "a", reports=[report("a", bound=True)]),
        worker("w2", copied_s=10 * POLICY.load_window_s),
    ]
    decided = plan(view(fleet, [model("a", need=1.5, held=9)]), POLICY)
    assert binds(decided) == {("a", "w2")}


def test_a_first_copy_is_no_charge_and_an_unknown_one_costs_what_others_took_by_the_byte():
    """A second of loading is not assumed where something was measured."""
    known = msgspec.structs.replace(model("a", need=0.1, held=1), load_seconds=0.02)
    fleet = [worker("w1", "a", reports=[report("a", bound=True)]), worker("w2")]
    new = model("new", waiting=True)
    [first] = plan(view(fleet, [known, new]), POLICY).bind
    assert first.load_s == 0.0
    picture = Fleet(view(fleet, [known, new]), POLICY)
    assert picture.load_seconds(new) == pytest.approx(0.02)
    nothing = Fleet(view(fleet, [model("a"), new]), POLICY)
    assert nothing.load_seconds(new) == POLICY.unknown_load_s


def test_a_slow_worker_is_asked_for_more_of_its_time():
    """By its own measurements: the faster one is chosen, though it has as much to do."""
    models = [model("a", need=0.3, held=1), model("b", need=0.3, held=1)]
    fleet = [worker("w1", "a", slowness=2.0), worker("w2", "b")]
    new = model("new", waiting=True)
    assert binds(plan(view(fleet, [*models, new]), POLICY)) == {("new", "w2")}


def test_arrays_and_single_questions_agree_on_who_could_make_room():
    """The bound that is reckoned for all workers at once is never below what one finds."""
    models = [model(f"m{n}", idle_s=n, min_copies=n % 2, size_bytes=5 + n) for n in range(8)]
    fleet = [worker(f"w{k}", *(f"m{n}" for n in range(8) if n % 3 != k)) for k in range(3)]
    spare = {ModelId("m7/1"): Binding(NOW - 0.1, "", spare=True)}
    fleet.append(worker("w9", reports=[report("m7")]))
    fleet[3] = msgspec.structs.replace(fleet[3], assigned=spare)
    picture = Fleet(view(fleet, models), POLICY)
    victims = Victims(picture)
    exact = np.array([
        sum(size.weights_bytes for m, size in picture.sizes(w).items() if victims.rank(w, m))
        for w in range(4)
    ])  # fmt: skip
    assert (victims.reclaimable(ModelId("a/1"), reclaim=False) >= exact).all()
    assert exact.any()


def test_a_spike_moves_no_neighbour():
    """Its new copy relieves the worker that it is on, and its backlog is over soon: what others
    on that worker are asked for is no more than before."""
    names = ("a", "b", "c")
    fleet = [
        worker("w1", "hot", *names, reports=[report(n, bound=True) for n in ("hot", *names)]),
        worker("w2"),
    ]
    hot = msgspec.structs.replace(
        model("hot"), demand=Demand(need=3.0, catching_up=2.1, held=40, last_active=NOW)
    )
    models = [hot, *(traffic(name, need=0.08, slow=0.08) for name in names)]
    decided = plan(view(fleet, models), POLICY)
    assert binds(decided) == {("hot", "w2")}
    assert not decided.unbind


def test_what_a_spike_needed_is_given_back_though_a_minute_remembers_it():
    """Traffic that is over is worth no spare copy, neither kept nor made."""
    reports = [report("a", bound=True)]
    fleet = [worker("w1", "a", reports=reports), worker("w2", "a", reports=reports)]
    over = Demand(rate_fast=2.0, rate_slow=50.0, seconds_per_item=0.01, need=0.5, last_active=NOW)
    a = msgspec.structs.replace(model("a"), demand=over, low_since=NOW - 60)
    decided = plan(view(fleet, [a]), POLICY)
    assert len(unbinds(decided)) == 1
    assert not plan(applied(view(fleet, [a]), decided), POLICY).bind


def test_a_long_search_for_who_makes_room_goes_on_at_the_next_planning():
    """Of five workers only the last has somebody who may go; two are looked into at a time."""
    policy = Policy(work_per_tick=4)
    names = ("w1", "w2", "w3", "w4")
    # What is spare there does not suffice, and what is not is too new to go.
    full = [
        msgspec.structs.replace(
            worker(name),
            assigned={
                ModelId("new/1"): Binding(NOW - 1),
                ModelId("spare/1"): Binding(NOW - 100, spare=True),
            },
            reported={
                each.model: each for each in (report("new", size=95), report("spare", size=5))
            },
        )
        for name in names
    ]
    last = worker("w5", "old", reports=[report("old", size=100)], slowness=2.0)
    models = [model("new"), model("spare"), model("old", idle_s=60), model("a", ready=1)]
    models[-1] = msgspec.structs.replace(models[-1], size_bytes=50)
    now, searched = view([*full, last], models), []
    for _ in range(5):
        decided = plan(now, policy)
        if decided.bind:
            break
        assert not decided.refused, "not before all were looked into"
        assert decided.pace.unfinished
        searched.append(decided.pace.searched[ModelId("a/1")])
        now = applied(now, decided)
    assert binds(decided) == {("a", "w5")}
    assert unbinds(decided) == {("old", "w5")}
    assert searched == [{"w1", "w2"}, set(names)]
    assert not decided.pace.searched


def test_a_model_that_is_to_be_alone_gets_a_worker_to_itself():
    """An empty one, however little it takes; and nothing is put beside it afterwards."""
    fleet = [worker("w1", "a"), worker("w2")]
    models = [model("a"), alone("own", waiting=True)]
    before = view(fleet, models)
    decided = plan(before, POLICY)
    assert binds(decided) == {("own", "w2")}
    after = applied(before, decided)
    more = msgspec.structs.replace(
        after, models={**after.models, "b/1": model("b", size_bytes=80, waiting=True)}
    )
    again = plan(more, POLICY)
    assert binds(again) == {("b", "w1")}
    assert not unbinds(again)


def test_idle_models_leave_a_worker_for_one_that_is_to_be_alone():
    """All of one worker's, or none: what is asked stays where it is."""
    fleet = [worker("w1", "busy", "idle"), worker("w2", "old", "older")]
    models = [
        model("busy", need=0.3, held=1),
        *(model(name, idle_s=60) for name in ("idle", "old", "older")),
        alone("own", waiting=True),
    ]
    decided = plan(view(fleet, models), POLICY)
    assert ("own", "w2") in binds(decided)
    assert {("old", "w2"), ("older", "w2")} <= unbinds(decided)
    assert ("busy", "w1") not in unbinds(decided)


def test_where_no_worker_can_be_cleared_it_is_refused_and_says_so():
    """With numbers, and not for good: a further worker would do."""
    fleet = [worker("w1", "busy")]
    models = [model("busy", need=0.3, held=1), alone("own", waiting=True)]
    decided = plan(view(fleet, models), POLICY)
    assert not decided.changes
    [no] = decided.refused
    assert (no.model, no.kind, no.permanent) == ("own/1", "no_room", False)
    assert no.refusal.need_bytes == fleet[0].budget_bytes
    assert decided.fleet_since.short == NOW  # after `grow_after_s` one more is wanted


def test_two_that_came_to_be_together_part():
    """After a placer's recovery, say: one goes, and has another worker."""
    fleet = [worker("w1", "own", "a"), worker("w2")]
    models = [alone("own", waiting=True), model("a", need=0.1, held=1)]
    before = view(fleet, models)
    after = applied(before, plan(before, POLICY))
    where = {name: set(each.assigned) for name, each in after.workers.items()}
    assert sorted(map(len, where.values())) == [1, 1]


def alone(name, **facts):
    return model(name, placement=Placement(alone=True), **facts)
