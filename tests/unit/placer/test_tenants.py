"""Quotas and shares of tenants, each in the smallest fleet that shows it."""

from __future__ import annotations

import msgspec
import pytest

from services.placer.core.changes import Held, Plan, applied
from services.placer.core.plan import place_one, plan
from services.placer.core.policy import Policy
from services.placer.core.view import Quota
from services.placer.core.wanted import Wanted
from services.placer.explain import explain, fleet
from services.placer.knowledge import Knowledge
from services.placer.metrics import Metrics
from shared import tenants
from shared.names import ModelId
from tests.unit.placer.test_knowledge import Clock, manifest
from tests.unit.placer.test_knowledge import report as told
from tests.unit.placer.test_plan import (
    NOW,
    POLICY,
    binds,
    model,
    retires,
    unbinds,
    view,
    worker,
)


def asked(name, tenant, **facts):
    return model(name, tenant=tenant, **{"need": 0.1, "held": 1, **facts})


def idle(name, tenant, seconds=50.0, **facts):
    return model(name, tenant=tenant, idle_s=seconds, **facts)


def quota(nbytes=None, share=1.0):
    return Quota(device_bytes=nbytes, share=share)


def settle(seen, decided):
    after = applied(seen, decided)
    assert not plan(after, POLICY).changes
    return after


def test_a_tenant_gets_no_more_than_its_quota_and_is_told_the_numbers():
    """Though the device has room for more."""
    seen = view(
        [worker("w1", "a1", "a2")],
        [asked("a1", "nlp"), asked("a2", "nlp"), asked("a3", "nlp", waiting=True)],
        quotas={"nlp": quota(25)},
    )
    decided = plan(seen, POLICY)
    assert not decided.bind
    [no] = decided.refused
    assert (no.model, no.kind, no.permanent) == ("a3/1", "quota", False)
    assert str(no.refusal) == "tenant nlp holds 20 of 25 bytes: needs 10 bytes, 5 are free"
    assert decided.wanted.workers == 1, "more workers would not help"
    settle(seen, decided)


def test_other_tenants_and_nobodys_models_are_not_concerned():
    """The quota is one tenant's."""
    seen = view(
        [worker("w1", "a1")],
        [
            asked("a1", "nlp"),
            asked("b1", "vision", waiting=True),
            asked("n1", "", waiting=True),
        ],
        quotas={"nlp": quota(10)},
    )
    assert binds(plan(seen, POLICY)) == {("b1", "w1"), ("n1", "w1")}


def test_its_own_least_recently_used_idle_model_makes_room():
    """Wherever that is, and nobody else's, though that was idle for longer."""
    fleet_ = [worker("w1", "a1", "old"), worker("w2", "a2")]
    seen = view(
        fleet_,
        [
            idle("a1", "nlp", 20),
            idle("a2", "nlp", 90),
            idle("old", "vision", 500),
            asked("a3", "nlp", waiting=True),
        ],
        quotas={"nlp": quota(20)},
    )
    decided = plan(seen, POLICY)
    assert unbinds(decided) == {("a2", "w2")}
    assert {name for name, _ in binds(decided)} == {"a3"}
    assert retires(decided) == {"a2"}
    settle(seen, decided)
    reflex = place_one(seen, ModelId("a3/1"), POLICY)
    assert unbinds(reflex) == {("a2", "w2")}


def test_nothing_is_given_up_for_what_does_not_fit_all_the_same():
    """A model that is larger than the whole quota is refused for good, at once."""
    seen = view(
        [worker("w1", "a1")],
        [idle("a1", "nlp"), asked("big", "nlp", size_bytes=30, waiting=True)],
        quotas={"nlp": quota(20)},
    )
    decided = plan(seen, POLICY)
    assert not decided.unbind
    [no] = place_one(seen, ModelId("big/1"), POLICY).refused
    assert (no.kind, no.permanent, no.code) == ("quota", True, "resource_exhausted")
    assert [(gone.model, gone.code) for gone in decided.retire] == [("big/1", "resource_exhausted")]


def test_who_waits_for_a_full_quota_is_told_after_a_while():
    """Until then one of its own may become idle."""
    seen = view(
        [worker("w1", "a1")],
        [asked("a1", "nlp"), asked("a2", "nlp", waiting=True)],
        quotas={"nlp": quota(10)},
    )
    first = plan(seen, POLICY)
    assert first.pace.over_quota == {"a2/1": NOW}
    assert not first.retire
    later = msgspec.structs.replace(applied(seen, first), at=NOW + POLICY.quota_wait_s)
    [gone] = plan(later, POLICY).retire
    assert (gone.model, gone.code) == ("a2/1", "resource_exhausted")
    assert "tenant nlp holds 10 of 10 bytes" in gone.reason


def test_copies_that_are_kept_at_all_times_are_kept_within_the_quota():
    """The second is refused, and takes nothing from the first."""
    seen = view(
        [worker("w1", "a1")],
        [idle("a1", "nlp", min_copies=1), idle("a2", "nlp", min_copies=1)],
        quotas={"nlp": quota(15)},
    )
    decided = plan(seen, POLICY)
    assert not decided.changes
    assert [no.kind for no in decided.refused] == ["quota"]
    assert decided.wanted.workers == 1


def test_a_quota_that_was_lowered_drops_no_request():
    """What is idle goes at once, and copies of what has several; the last of what is asked stays
    until it is idle."""
    fleet_ = [worker("w1", "a1", "a2", "a3"), worker("w2", "a1")]
    models = [asked("a1", "nlp", need=1.2), asked("a2", "nlp"), idle("a3", "nlp")]
    seen = view(fleet_, models, quotas={"nlp": quota(5)})
    decided = plan(seen, POLICY)
    assert {name for name, _ in unbinds(decided)} == {"a1", "a3"}
    after = settle(seen, decided)
    left = {m for each in after.workers.values() for m in each.assigned}
    assert left == {"a1/1", "a2/1"}
    quiet = {**after.models, ModelId("a2/1"): idle("a2", "nlp")}
    assert {n for n, _ in unbinds(plan(msgspec.structs.replace(after, models=quiet), POLICY))} == {
        "a2"
    }


def test_a_worker_that_leaves_hands_over_within_the_quota():
    """What it has counts no more from then on."""
    fleet_ = [worker("w1", "a1", leaving=True, serves=False, takes_new=False), worker("w2")]
    seen = view(fleet_, [asked("a1", "nlp")], quotas={"nlp": quota(10)})
    assert binds(plan(seen, POLICY)) == {("a1", "w2")}


def test_memory_that_is_short_goes_to_tenants_by_share():
    """Whoever came first and asks for everything gives back what is another's share, and nothing
    goes to and fro. What is the other's beyond its share it does not get."""
    spiking = [asked(f"a{n}", "a") for n in range(10)]
    steady = [asked(f"b{n}", "b", waiting=True) for n in range(6)]
    seen = view([worker("w1", *(f"a{n}" for n in range(10)))], [*spiking, *steady])
    decided = plan(seen, POLICY)
    after = settle(seen, decided)
    held = [m for m in after.workers["w1"].assigned if m.startswith("b")]
    assert len(held) == 5
    assert len(after.workers["w1"].assigned) == 10


def test_memory_follows_the_weights():
    """Three to one."""
    models = [asked(f"{t}{n}", t, waiting=True) for t in "ab" for n in range(10)]
    seen = view([worker("w1", budget=80)], models, quotas={"b": quota(share=3.0)})
    after = settle(seen, plan(seen, POLICY))
    assert sum(m.startswith("b") for m in after.workers["w1"].assigned) == 6
    assert len(after.workers["w1"].assigned) == 8


def test_a_model_of_its_own_tenant_never_has_to_go_as_it_is_asked():
    """Shares are between tenants."""
    models = [asked(f"a{n}", "a") for n in range(10)]
    new = asked("a10", "a", waiting=True)
    seen = view([worker("w1", *(f"a{n}" for n in range(10)))], [*models, new])
    decided = plan(seen, POLICY)
    assert not decided.unbind
    assert [no.kind for no in decided.refused] == ["no_room"]


def test_of_what_is_idle_the_tenants_that_holds_most_goes_first():
    """Whatever priority its models have: that is among its own."""
    fleet_ = [worker("w1", *(f"a{n}" for n in range(9)), "b0")]
    models = [idle(f"a{n}", "a", 10 + n, priority=5) for n in range(9)]
    seen = view(fleet_, [*models, idle("b0", "b", 500), asked("b1", "b", waiting=True)])
    assert unbinds(plan(seen, POLICY)) == {("a8", "w1")}


@pytest.mark.parametrize(("share", "copies"), [(1.0, (2, 2)), (3.0, (3, 1))])
def test_device_time_that_is_short_is_planned_by_share(share, copies):
    """A spike of one tenant gets the copies that its share can use; the other's demand is met as
    long as it is less than its own."""
    fleet_ = [worker(f"w{n}") for n in range(4)]
    seen = view(
        fleet_,
        [asked("a", "a", need=50.0), asked("b", "b", need=1.4)],
        quotas={"a": quota(share=share)},
    )
    wanted = plan(seen, POLICY)
    assert (wanted.explained["a/1"].want, wanted.explained["b/1"].want) == copies
    given = {each.tenant: each.given for each in wanted.tenants}
    assert given["a"] + given["b"] == pytest.approx(2.8)


def test_spare_device_time_is_used_by_whoever_asks():
    """With room for all nobody is brought down."""
    seen = view(
        [worker(f"w{n}") for n in range(4)],
        [asked("a", "a", need=2.0), asked("b", "b", need=0.1)],
    )
    assert plan(seen, POLICY).explained["a/1"].want == 3


def test_demand_beyond_a_quota_asks_for_no_worker():
    """Its one copy is as busy as it can be: no further worker would serve the rest."""
    busy = asked("a1", "nlp", need=9.0)
    late = {"since": NOW - 100}
    seen = view([worker("w1", "a1", **late)], [busy], quotas={"nlp": quota(10)})
    short = msgspec.structs.replace(seen.fleet_since, short=NOW - 50)
    seen = msgspec.structs.replace(seen, fleet_since=short)
    wanted = plan(seen, POLICY).wanted
    assert wanted.workers <= 2
    free = msgspec.structs.replace(seen, quotas={})
    assert plan(free, POLICY).wanted.workers == 13


def test_people_are_told_what_a_tenant_has():
    """`explain`, `/fleet` and metrics; nothing of tenants where there are none."""
    clock = Clock()

    knowledge = Knowledge(Policy(), clock)
    own = manifest("a", tenant="nlp")
    knowledge.activate(own.id, own, why="asked")
    knowledge.adopt("w1", {own.id: "stored"}, 1)
    knowledge.see([told()], {}, clock.now)
    knowledge.bound_tenants(
        {"nlp": tenants.Quota(device_bytes=100, share=2.0), "idle": tenants.Quota(device_bytes=7)}
    )
    assert knowledge.shares == {"nlp": 2.0}
    knowledge.remember(plan(knowledge.view(), knowledge.policy))
    has = explain(knowledge, own)["tenant"]
    assert (has["device_bytes"], has["device_bytes_quota"], has["share"]) == (10, 100, 2.0)
    known = {each["tenant"]: each for each in fleet(knowledge, Wanted(), 1)["tenants"]}
    assert known["nlp"] == has
    assert known["idle"]["device_bytes"] == 0
    metrics = Metrics()
    metrics.knowledge = knowledge
    value = metrics.registry.get_sample_value
    assert value("roost_placer_tenant_bytes", {"tenant": "nlp"}) == 10
    assert value("roost_placer_tenant_quota_bytes", {"tenant": "nlp"}) == 100


def test_series_of_tenants_are_bounded():
    """The rest are one together."""
    clock = Clock()

    knowledge = Knowledge(Policy(), clock)
    knowledge.remember(Plan(tenants=tuple(Held(f"t{n}", n + 1, 0.5) for n in range(150))))
    metrics = Metrics()
    metrics.knowledge = knowledge
    value = metrics.registry.get_sample_value
    assert value("roost_placer_tenant_bytes", {"tenant": "t149"}) == 150
    assert value("roost_placer_tenant_bytes", {"tenant": "t3"}) is None
    assert value("roost_placer_tenant_bytes", {"tenant": "_other"}) == sum(range(1, 51))
    assert value("roost_placer_tenant_need", {"tenant": "_other"}) == 25.0
