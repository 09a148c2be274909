"""Single decisions of the placer, each in the smallest fleet that shows it."""

from __future__ import annotations

import msgspec
import pytest

from services.placer.core.changes import applied
from services.placer.core.plan import place_one, plan, want
from services.placer.core.policy import Policy
from services.placer.core.verify import verify
from services.placer.core.view import (
    Binding,
    Demand,
    FleetSince,
    ModelView,
    View,
    WorkerView,
)
from shared.control import ModelReport
from shared.layout import Share
from shared.models import Footprint
from shared.names import ModelId

NOW = 1000.0
POLICY = Policy()


def model(name, *, need=0.0, ready=0, held=0, idle_s=0.0, **facts):
    demand = Demand(need=need, ready=ready, held=held, last_active=NOW - idle_s)
    facts.setdefault("size_bytes", 10)
    return ModelView(model=ModelId(f"{name}/1"), demand=demand, **facts)


def report(name, *, tier="device", bound=False, size=10, **rest):
    return ModelReport(
        model=ModelId(f"{name}/1"),
        tier=tier,
        phase="ready",
        bound=bound,
        footprint=Footprint(size),
        **rest,
    )


def worker(name, *assigned, budget=100, since=NOW - 100, reports=(), **rest):
    return WorkerView(
        worker=name,
        budget_bytes=budget,
        assigned={ModelId(f"{m}/1"): Binding(since) for m in assigned},
        reported={r.model: r for r in reports},
        **rest,
    )


def view(workers, models, **rest):
    return View(
        at=NOW,
        workers={w.worker: w for w in workers},
        models={m.model: m for m in models},
        **rest,
    )


def binds(decided):
    return {(b.model.removesuffix("/1"), b.worker) for b in decided.bind}


def unbinds(decided):
    return {(u.model.removesuffix("/1"), u.worker) for u in decided.unbind}


def retires(decided):
    return {r.model.removesuffix("/1") for r in decided.retire}


@pytest.mark.parametrize(
    ("need", "copies"), [(0.0, 1), (0.69, 1), (0.7, 1), (0.71, 2), (1.4, 2), (9.0, 4)]
)
def test_want_is_demand_over_the_target_utilization(need, copies):
    """One copy when there is no demand, as many as there are workers when there is too much."""
    assert want(model("a", need=need), 4, POLICY) == copies


def test_want_keeps_the_models_own_limits():
    """min_copies, max_copies, and one for what has a state."""
    assert want(model("a", min_copies=2), 4, POLICY) == 2
    assert want(model("a", need=9.0, max_copies=3), 4, POLICY) == 3
    assert want(model("a", need=9.0, stateful=True), 4, POLICY) == 1


def test_the_worker_that_has_the_weights_is_preferred():
    """On the device before in host memory before on disk."""
    a = model("a", waiting=True, load_seconds=1.0)
    disk, host = worker("w1"), worker("w2", reports=[report("a", tier="host")])
    device = worker("w3", reports=[report("a")])
    assert binds(plan(view([disk, host, device], [a]), POLICY)) == {("a", "w3")}
    assert binds(plan(view([disk, host], [a]), POLICY)) == {("a", "w2")}


def test_what_fits_no_device_is_held_in_the_hosts_memory():
    """Where it is swapped in; a device with room comes first, and nobody has to make room for it.
    Beyond both it is refused, and what is larger than a device is refused at once."""
    first, a, big = model("first"), model("a", waiting=True, size_bytes=60), model("big")
    big = msgspec.structs.replace(big, size_bytes=101, waiting=True)
    swapping = worker("w1", "first", host_bytes=40, reports=[report("first", size=70, bound=True)])
    decided = plan(view([swapping], [first, a]), POLICY)
    assert binds(decided) == {("a", "w1")}
    assert not decided.unbind
    assert decided.bind[0].reason.endswith("to be swapped in")
    assert verify(decided, view([swapping], [first, a]))[0] == decided
    assert binds(plan(view([swapping, worker("w2")], [first, a]), POLICY)) == {("a", "w2")}
    less = msgspec.structs.replace(swapping, host_bytes=29)
    young = msgspec.structs.replace(less, assigned={ModelId("first/1"): Binding(NOW)})
    (no,) = plan(view([young], [first, a]), POLICY).refused
    assert str(no.refusal) == (
        "no room on the device and in the host's memory: needs 60 bytes, 59 are free"
    )
    (no,) = plan(view([swapping], [first, big]), POLICY).refused
    assert no.permanent


def test_a_part_that_is_shared_counts_once():
    """Ten models of 50 with 48 in common fit 70."""
    shares = (Share("backbone", 48),)
    names = [f"m{n}" for n in range(10)]
    reports = [report(name, tier="disk") for name in names]
    footprint = Footprint(50, shares=shares)
    reports = [msgspec.structs.replace(each, footprint=footprint) for each in reports]
    crowded = view(
        [worker("w", *names[:9], budget=68, reports=reports)],
        [model(name, waiting=True) for name in names],
    )
    assert binds(plan(crowded, POLICY)) == {("m9", "w")}


def test_the_time_of_a_swap_is_what_the_worker_says():
    """Rather than a share of the load."""
    a = model("a", waiting=True, load_seconds=1.0)
    slow = worker("w1", reports=[report("a", tier="host", load_seconds=0.5)])
    fast = worker("w2", reports=[report("a", tier="host", load_seconds=0.01)])
    assert binds(plan(view([slow, fast], [a]), POLICY)) == {("a", "w2")}


def test_a_free_worker_is_preferred_to_a_busy_one_with_the_weights():
    """When waiting for the device would take longer than loading."""
    a, busy = model("a", waiting=True, load_seconds=0.3), model("busy", need=0.65, held=1)
    fleet = [worker("w1", "busy", reports=[report("a")]), worker("w2")]
    assert binds(plan(view(fleet, [a, busy]), POLICY)) == {("a", "w2")}


def test_up_at_once_but_only_some_at_a_time():
    """Two in a small fleet, a third of a large one, those on their way included."""
    hot = model("hot", need=20.0, held=5)
    fleet = [worker("w0", "hot", reports=[report("hot", bound=True)])]
    fleet += [worker(f"w{n}") for n in range(1, 9)]
    decided = plan(view(fleet[:5], [hot]), POLICY)
    assert len(decided.bind) == 2
    decided = plan(view(fleet, [hot]), POLICY)
    assert len(decided.bind) == 3
    assert not plan(applied(view(fleet, [hot]), decided), POLICY).bind


def test_down_only_after_the_hold_down_and_the_newest_first():
    """A copy too many is noted, and released when it has been for long enough."""
    a = model("a", need=0.1)
    reports = [report("a", bound=True)]
    fleet = [
        worker("w1", "a", since=NOW - 100, reports=reports),
        worker("w2", "a", since=NOW - 50, reports=reports),
    ]
    first = plan(view(fleet, [a]), POLICY)
    assert not first.changes
    assert first.low_since == {"a/1": NOW}
    low = msgspec.structs.replace(a, low_since=NOW - POLICY.hold_down_s)
    assert unbinds(plan(view(fleet, [low]), POLICY)) == {("a", "w2")}
    slow = msgspec.structs.replace(low, load_seconds=5.0)  # it cost more to get there
    assert not plan(view(fleet, [slow]), POLICY).changes


def test_demand_between_the_two_thresholds_changes_nothing():
    """Enough for two copies to be kept, too little for a second to be added."""
    reports = [report("a", bound=True)]
    a = model("a", need=0.65, low_since=NOW - 100)
    one = view([worker("w1", "a", reports=reports), worker("w2")], [a])
    two = view([worker(w, "a", reports=reports) for w in ("w1", "w2")], [a])
    assert not plan(one, POLICY).changes
    assert not plan(two, POLICY).changes


def test_the_least_recently_used_idle_model_makes_room():
    """Not the one that is asked, not the one that came a moment ago, not one to be kept."""
    fleet = [
        WorkerView(
            worker="w1",
            budget_bytes=50,
            assigned={
                ModelId("asked/1"): Binding(0.0),
                ModelId("fresh/1"): Binding(NOW - 0.5),
                ModelId("kept/1"): Binding(0.0),
                ModelId("older/1"): Binding(0.0),
                ModelId("old/1"): Binding(0.0),
            },
        )
    ]
    models = [
        model("asked", held=1, idle_s=0),
        model("fresh", idle_s=500),
        model("kept", idle_s=400, min_copies=1),
        model("older", idle_s=300),
        model("old", idle_s=200),
        model("new", waiting=True),
    ]
    decided = plan(view(fleet, models), POLICY)
    assert unbinds(decided) == {("older", "w1")}
    assert binds(decided) == {("new", "w1")}
    assert retires(decided) == {"older"}
    assert decided.unbind[0].idle


def test_no_more_victims_than_needed():
    """A large one that makes enough room spares the small ones before it."""
    fleet = [worker("w1", "small", "large", budget=60)]
    models = [
        model("small", idle_s=300),
        model("large", idle_s=200, size_bytes=50),
        model("new", waiting=True, size_bytes=50),
    ]
    assert unbinds(plan(view(fleet, models), POLICY)) == {("large", "w1")}


def test_without_a_victim_it_waits_and_more_workers_are_wanted():
    """The refusal has the numbers; the wish comes after a moment, with its reason."""
    fleet = [worker("w1", "busy", budget=15, reports=[report("busy", bound=True)])]
    waiting = view(fleet, [model("busy", held=1), model("new", waiting=True)])
    decided = plan(waiting, POLICY)
    assert not decided.changes
    [no] = decided.refused
    assert (no.refusal.need_bytes, no.refusal.free_bytes, no.permanent) == (10, 5, False)
    assert decided.wanted.workers == 1
    later = msgspec.structs.replace(waiting, fleet_since=FleetSince(short=NOW - 1))
    wanted = plan(later, POLICY).wanted
    assert wanted.workers == 2
    assert "new/1" in wanted.reasons[0]


def test_a_surplus_copy_makes_room_before_its_hold_down_is_over():
    """A request that waits counts more than a second copy that is not needed."""
    reports = [report("a", bound=True)]
    fleet = [worker(w, "a", budget=15, reports=reports) for w in ("w1", "w2")]
    models = [model("a", need=0.2, held=1), model("new", waiting=True)]
    decided = plan(view(fleet, models), POLICY)
    assert len(decided.unbind) == 1
    assert not decided.retire


def test_an_idle_model_is_deactivated_but_not_one_with_min_copies():
    """After `deactivate_after_s`, all its bindings go and it is retired."""
    fleet = [worker("w1", "idle", "kept"), worker("w2", "idle")]
    models = [model("idle", idle_s=601), model("kept", idle_s=601, min_copies=1)]
    decided = plan(view(fleet, models), POLICY)
    assert unbinds(decided) == {("idle", "w1"), ("idle", "w2")}
    assert retires(decided) == {"idle"}


def test_what_was_measured_larger_than_planned_is_moved():
    """The idle goes first, and elsewhere if there is room."""
    reports = [report("big", bound=True, size=80), report("idle", bound=True, size=30)]
    fleet = [worker("w1", "big", "idle", reports=reports), worker("w2")]
    decided = plan(view(fleet, [model("big", held=1), model("idle", idle_s=60)]), POLICY)
    assert unbinds(decided) == {("idle", "w1")}
    assert binds(decided) == {("idle", "w2")}


def test_what_is_shed_and_taken_back_is_no_new_copy():
    """It was there all the time: it takes nobody's place among the copies on their way."""
    reports = [report("hot", bound=True, size=1), report("big", size=120)]
    fleet = [worker("w0"), worker("w1"), worker("w2", "hot", "big", reports=reports)]
    models = [model("hot", need=3.0, size_bytes=1), model("big", size_bytes=1)]
    first = plan(view(fleet, models), POLICY)
    assert {b for b in binds(first) if b[0] == "hot"} == {("hot", "w0"), ("hot", "w1")}
    assert unbinds(first) == {("big", "w2")}
    assert not plan(applied(view(fleet, models), first), POLICY).changes


def test_a_draining_workers_models_are_bound_elsewhere_first():
    """It lets go when the successor consumes; a stateful model moves in one step."""
    reports = [report("a", bound=True), report("s", bound=True)]
    leaving = worker("w1", "a", "s", reports=reports, takes_new=False, serves=False)
    models = [model("a"), model("s", stateful=True)]
    first = plan(view([leaving, worker("w2")], models), POLICY)
    assert binds(first) == {("a", "w2"), ("s", "w2")}
    assert unbinds(first) == {("s", "w1")}
    taken = worker("w2", "a", "s", reports=reports)
    second = plan(
        view(
            [msgspec.structs.replace(leaving, assigned={ModelId("a/1"): Binding(0.0)}), taken],
            models,
        ),
        POLICY,
    )
    assert unbinds(second) == {("a", "w1")}


def test_a_model_that_failed_is_tried_on_another_worker_then_given_up():
    """With the error for whoever waits."""
    a = model("a", waiting=True)
    failed = worker("w1", "a", failed={ModelId("a/1"): "no zip"})
    decided = plan(view([failed, worker("w2")], [a]), POLICY)
    assert (unbinds(decided), binds(decided)) == ({("a", "w1")}, {("a", "w2")})
    [gone] = plan(view([failed], [a]), POLICY).retire
    assert gone.code == "model_failed"
    assert "no zip" in gone.reason


def test_larger_than_every_device_is_permanent_unless_an_engine_is_still_starting():
    """Nothing is said of a device whose size is not known yet."""
    a = model("a", waiting=True, size_bytes=500)
    [no] = place_one(view([worker("w1")], [a]), a.model, POLICY).refused
    assert no.permanent
    assert (no.refusal.need_bytes, no.refusal.free_bytes) == (500, 100)
    starting = worker("w2", budget=0, takes_new=False)
    [no] = place_one(view([worker("w1"), starting], [a]), a.model, POLICY).refused
    assert not no.permanent
    [no] = place_one(view([], [a]), a.model, POLICY).refused
    assert (no.permanent, no.refusal.reason) == (False, "no worker is there")


@pytest.mark.parametrize(
    ("fleet", "kind"),
    [
        ([], "no_worker"),
        ([worker("w1", budget=9)], "too_large"),
        ([worker("w1", budget=9), worker("w2", budget=0, takes_new=False)], "too_large"),
        ([worker("w1", "busy", budget=15)], "no_room"),
        ([worker("w1", failed={ModelId("a/1"): "no zip at 0x7f3a"})], "failed_to_load"),
        (
            [
                worker("w1", failed={ModelId("a/1"): "its engine ended"}),
                worker("w2", failed={ModelId("a/1"): "w1's did"}, suspects={ModelId("a/1")}),
            ],
            "suspected",
        ),
        ([worker("w1", takes_new=False)], "leaving"),
        ([worker("w1", "a", serves=False)], "has_all"),
    ],
)
def test_every_no_is_of_a_kind(fleet, kind):
    """A fixed word beside the text, which may hold numbers or a model's own error."""
    models = [model("a", waiting=True), model("busy", held=1)]
    [no] = place_one(view(fleet, models), ModelId("a/1"), POLICY).refused
    assert no.kind == kind


def test_an_estimate_gives_way_to_what_was_measured():
    """On this worker, on another of its kind, else by the worker's or the file's size."""
    known = model("a", waiting=True, size_bytes=10, known={"cpu": Footprint(150)})
    [no] = place_one(view([worker("w1")], [known]), known.model, POLICY).refused
    assert no.refusal.need_bytes == 150
    here = worker("w1", reports=[report("a", size=20)])
    assert place_one(view([here], [known]), known.model, POLICY).bind


def test_fewer_workers_are_wanted_only_after_a_long_time_and_if_memory_allows():
    """One at a time, and never fewer than one."""
    fleet = [worker("w1"), worker("w2")]
    long_ample = FleetSince(ample=NOW - POLICY.shrink_after_s)
    assert plan(view(fleet, []), POLICY).wanted.workers == 2
    assert plan(view(fleet, [], fleet_since=long_ample), POLICY).wanted.workers == 1
    full = [worker("w1", "a", "b"), worker("w2", "c", "d")]
    models = [model(n, size_bytes=40) for n in "abcd"]
    assert plan(view(full, models, fleet_since=long_ample), POLICY).wanted.workers == 2
    assert plan(view(fleet[:1], [], fleet_since=long_ample), POLICY).wanted.workers == 1


def test_a_fleet_that_swaps_or_shares_shrinks_too():
    """What counts is what would not fit the others: shared weights count once on each worker,
    and the host's memory is room; but not for what never leaves a device."""
    since = FleetSince(ample=NOW - POLICY.shrink_after_s)
    models = [model(n, size_bytes=40) for n in "abcd"]

    def wanted(**rest):
        fleet = [worker("w1", "a", "b", **rest), worker("w2", "c", "d", **rest)]
        return plan(view(fleet, models, fleet_since=since), POLICY).wanted.workers

    assert wanted() == 2
    assert wanted(host_bytes=60) == 1
    assert wanted(host_bytes=59) == 2
    pinned = {"cpu": Footprint(40, pinned=True)}
    models = [model(n, size_bytes=40, known=pinned) for n in "abcd"]
    assert wanted(host_bytes=60) == 2
    models = [tuned(n, 40, 35) for n in "abcd"]
    assert wanted() == 1
    models = [tuned(n, 40, 29) for n in "abcd"]
    assert wanted() == 2


def tuned(name, size, backbone):
    """A model of which nothing was measured; the repository knows what it has in common."""
    share = Share("backbone", backbone)
    estimate = Footprint(size, measured=False, shares=(share,))
    return model(name, size_bytes=size + 1, estimate=estimate, waiting=True)


def test_a_burst_of_fine_tunes_finds_room_before_any_is_loaded():
    """Each counts without the backbone that is there with the first; on a worker that is seen
    not to share, and before the repository was asked, in full."""
    models = [tuned(f"m{n}", 40, 35) for n in range(10)]
    decided = plan(view([worker("w1")], models), POLICY)
    assert len(decided.bind) == 10
    assert not decided.refused
    assert len(plan(view([worker("w1", shares=False)], models), POLICY).bind) == 2
    unknown = [model(f"m{n}", size_bytes=40, waiting=True) for n in range(10)]
    assert len(plan(view([worker("w1")], unknown), POLICY).bind) == 2


def test_demand_beyond_the_fleet_asks_for_as_many_workers_as_it_takes():
    """At the target utilization, with the numbers as the reason."""
    hot = model("hot", need=4.9, held=9)
    since = FleetSince(short=NOW - 1)
    wanted = plan(view([worker("w1", "hot")], [hot], fleet_since=since), POLICY).wanted
    assert wanted.workers == 7
    assert "4.90 device s/s" in wanted.reasons[0]


def test_higher_priority_is_placed_first_when_memory_is_short():
    """Of two that wait for one place."""
    models = [model("low", waiting=True), model("high", waiting=True, priority=1)]
    assert binds(plan(view([worker("w1", budget=15)], models), POLICY)) == {("high", "w1")}


def test_verification_refuses_only_what_has_become_wrong():
    """A victim that is asked again stays; what then has no room is not placed; the rest is."""
    fleet = [worker("w1", "idle", budget=15), worker("w2", budget=15)]
    models = [
        model("idle", idle_s=100),
        model("one", waiting=True, load_seconds=1.0),
        model("two", waiting=True, load_seconds=1.0),
    ]
    decided = plan(view(fleet, models), POLICY)
    assert len(decided.bind) == 2
    asked = [model("idle", held=1), *models[1:]]
    kept, refused = verify(decided, view(fleet, asked))
    assert len(kept.bind) == 1
    assert not kept.unbind
    assert not kept.retire
    assert len(refused) == 2
    kept, _ = verify(decided, view(fleet[1:], asked))
    assert {b.worker for b in kept.bind} == {"w2"}


def test_a_plan_prints_itself_as_one_line():
    """For the log: what changes, why, and every no."""
    fleet = [worker("w1", "old", budget=15)]
    models = [
        model("old", idle_s=100),
        model("new", waiting=True),
        model("huge", waiting=True, size_bytes=16),
    ]
    said = str(plan(view(fleet, models), POLICY))
    assert "+new/1@w1" in said
    assert "-old/1@w1 (makes room for new/1)" in said
    assert "no huge/1: larger than the whole device budget: needs 16 bytes, 15 are free" in said
    assert "\n" not in said
