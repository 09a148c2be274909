"""How many workers are wanted, and whom the fleet would miss least."""

from __future__ import annotations

import msgspec

from services.placer.core.policy import Policy
from services.placer.core.refused import Refused
from services.placer.core.view import (
    Binding,
    Demand,
    FleetSince,
    ModelView,
    View,
    WorkerView,
)
from services.placer.core.wanted import cheapest_to_let_go, idle_since, workers_wanted
from shared.fit import Refusal
from shared.models import Placement
from shared.names import ModelId

NOW = 1000.0
ASLEEP = Policy(min_workers=0, scale_to_zero_after_s=60.0)


def model(name, *, need=0.0, ready=0, rate=0.0, idle_s=0.0, **facts):
    demand = Demand(need=need, ready=ready, rate_slow=rate, last_active=NOW - idle_s)
    return ModelView(model=ModelId(f"{name}/1"), demand=demand, size_bytes=10, **facts)


def worker(name, *assigned, **rest):
    return WorkerView(
        worker=name,
        budget_bytes=100,
        assigned={ModelId(f"{each}/1"): Binding(0.0) for each in assigned},
        **rest,
    )


def view(workers, models=(), **rest):
    return View(
        at=NOW,
        workers={each.worker: each for each in workers},
        models={each.model: each for each in models},
        **rest,
    )


def wanted(seen, policy=ASLEEP, unplaceable=()):
    return workers_wanted(seen, policy, unplaceable=unplaceable, assigned_bytes=0, device_bytes=0)


def test_a_fleet_that_nobody_asks_may_go_to_sleep():
    """After so long without a request none are wanted, with the reason; not a moment before."""
    fleet = [worker("w1", "a")]
    early, _ = wanted(view(fleet, [model("a", idle_s=59)]))
    late, _ = wanted(view(fleet, [model("a", idle_s=60)]))
    assert (early.workers, late.workers) == (1, 0)
    assert late.causes == ("idle",)
    assert "60 s" in late.reasons[0]


def test_the_last_worker_that_goes_is_not_followed_by_another():
    """What is left of a demand that decays is no reason in silence; a request is."""
    leaving = worker("w1", "a", serves=False, leaving=True)
    assert wanted(view([leaving], [model("a", need=1e-9, idle_s=60)]))[0].workers == 0
    assert wanted(view([leaving], [model("a", need=1e-9, ready=1)]))[0].workers == 1


def test_silence_is_remembered_when_the_models_are_forgotten():
    """Models stop being active before the fleet goes: the silence goes on."""
    seen = view([worker("w1")], fleet_since=FleetSince(idle=NOW - 60))
    assert wanted(seen)[0].workers == 0
    began, since = wanted(view([worker("w1")]))
    assert (began.workers, since.idle) == (1, NOW)


def test_what_is_asked_or_kept_keeps_the_fleet_awake():
    """A request that waits, or a model that is to have copies at all times."""
    long_idle = FleetSince(idle=NOW - 999)
    for busy in (model("a", ready=1), model("a", waiting=True), model("a", min_copies=1)):
        seen = view([worker("w1", "a")], [busy], fleet_since=long_idle)
        assert idle_since(seen) is None
        decided, since = wanted(seen)
        assert (decided.workers, since.idle) == (1, None)


def test_the_first_request_wakes_a_sleeping_fleet():
    """Without workers none are wanted, until something has no place: then one, at once."""
    assert wanted(view([]))[0].workers == 0
    no_place = Refused(ModelId("a/1"), Refusal("no worker is there"), "no_worker")
    decided, _ = wanted(view([], [model("a", waiting=True)]), unplaceable=[no_place])
    assert (decided.workers, decided.causes) == (1, ("no_place",))


def test_a_model_without_a_place_waits_for_the_engine_that_starts():
    """Not for one more worker, unless what is asked is too much for both. It is judged anew
    once the engine runs."""
    no_place = [Refused(ModelId("a/1"), Refusal("no room"), "no_room")]
    starting = worker("w2", takes_new=False)
    policy, long_short = Policy(grow_after_s=0.6), FleetSince(short=NOW - 60)
    seen = view([worker("w1"), starting], [model("a", waiting=True)], fleet_since=long_short)
    decided, since = wanted(seen, policy, no_place)
    assert (decided.workers, since.short) == (2, NOW)
    running = view([worker("w1"), worker("w2")], [model("a", waiting=True)], fleet_since=long_short)
    assert wanted(running, policy, no_place)[0].workers == 3
    much = view([worker("w1"), starting], [model("a", need=2.0)], fleet_since=long_short)
    assert wanted(much, policy, no_place)[0].workers == 3


def test_never_fewer_than_the_least():
    """The least is wanted whether anybody asks or not, and spare ones above it are let go."""
    policy = Policy(min_workers=2, shrink_after_s=10)
    decided, _ = wanted(view([worker("w1")]), policy)
    assert (decided.workers, decided.causes) == (2, ("minimum",))
    ample = FleetSince(ample=NOW - 10)
    two = [worker("w1"), worker("w2")]
    assert wanted(view(two, fleet_since=ample), policy)[0].workers == 2
    decided, _ = wanted(view([*two, worker("w3")], fleet_since=ample), policy)
    assert (decided.workers, decided.causes) == (2, ("spare",))


def test_leaving_workers_do_not_count():
    """Who was asked to leave serves until then, but the fleet is as large as who stays."""
    leaving = worker("w2", "a", leaving=True, serves=False, takes_new=False)
    decided, _ = wanted(view([worker("w1"), leaving]), Policy())
    assert decided.workers == 1


def test_the_least_missed_is_let_go():
    """The worker with less to take over and less to load again goes first."""
    busy = model("busy", need=0.5, rate=10, load_seconds=1)
    rare = model("rare", rate=0.01, load_seconds=1)
    both = model("both", rate=10, load_seconds=5)
    fleet = [worker("w1", "busy", "both"), worker("w2", "rare", "both")]
    chosen = cheapest_to_let_go(view(fleet, [busy, rare, both]))
    assert chosen.worker == "w2"
    assert "1 models are there alone" in chosen.why


def test_one_that_serves_nothing_goes_before_any_other():
    """A worker whose engine is gone for long is no loss."""
    fleet = [worker("w1"), worker("w2", "a", serves=False, takes_new=False)]
    chosen = cheapest_to_let_go(view(fleet, [model("a")]))
    assert chosen.worker == "w2"


def test_of_equals_the_last_one_goes():
    """With numbers in names, the one that was started last."""
    fleet = [worker("worker-0"), worker("worker-2"), worker("worker-1")]
    assert cheapest_to_let_go(view(fleet)).worker == "worker-2"


def test_a_worker_that_alone_has_the_labels_goes_last():
    """A model that is pinned to it could be nowhere else."""
    pinned = model("a", placement=Placement(worker_selector={"gpu": "t4"}))
    fleet = [
        worker("w1", "b", labels={"gpu": "none"}),
        worker("w2", labels={"gpu": "t4"}),
    ]
    models = [pinned, model("b", need=0.9, rate=9, load_seconds=9)]
    assert cheapest_to_let_go(view(fleet, models)).worker == "w1"
    both = [msgspec.structs.replace(each, labels={"gpu": "t4"}) for each in fleet]
    assert cheapest_to_let_go(view(both, models)).worker == "w2"


def test_nobody_is_let_go_twice():
    """Who leaves already is not chosen again; with nobody left there is nobody to choose."""
    gone = {"leaving": True, "serves": False, "takes_new": False}
    fleet = [worker("w1"), worker("w2", **gone)]
    assert cheapest_to_let_go(view(fleet)).worker == "w1"
    assert cheapest_to_let_go(view([worker("w1", **gone)])) is None
