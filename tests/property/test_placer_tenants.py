"""The placer's laws where models belong to tenants: quotas, shares, and nothing else changed."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from services.placer.core.changes import applied
from services.placer.core.fleet import Fleet
from services.placer.core.plan import place_one, plan
from services.placer.core.tenancy import water_fill
from services.placer.core.verify import verify
from services.placer.core.view import Quota, View
from shared import tenants
from tests.property.test_placer_core import POLICY, asked, served, views
from tests.property.test_placer_laws import MODELS, Loop

TENANTS = ("", "a", "b")
OWNERS = dict(zip(MODELS, ("a", "b", "a", "b", "a", "", "b"), strict=True))


@st.composite
def shared_views(draw: st.DrawFn) -> View:
    """Any fleet, with models of several tenants, some with a quota."""
    view = draw(views())
    models = {
        model: msgspec.structs.replace(facts, tenant=draw(st.sampled_from(TENANTS)))
        for model, facts in view.models.items()
    }
    quotas = {
        tenant: Quota(
            device_bytes=draw(st.sampled_from([None, 1, 30, 80, 150])),
            share=draw(st.sampled_from([0.5, 1.0, 3.0])),
        )
        for tenant in draw(st.sets(st.sampled_from(TENANTS[1:])))
    }
    return msgspec.structs.replace(view, models=models, quotas=quotas)


def held(view: View, tenant: str) -> int:
    tenancy = Fleet(view, POLICY).tenancy
    if tenant not in tenancy.names:
        return 0
    return int(tenancy.held[list(tenancy.names).index(tenant)])


@given(shared_views())
@settings(max_examples=80, deadline=None)
def test_no_plan_gives_a_tenant_more_than_its_quota(view: View) -> None:
    """Where it holds more already, nothing is added, and it only becomes less."""
    decided = plan(view, POLICY)
    after = applied(view, decided)
    for tenant, quota in view.quotas.items():
        most = quota.device_bytes
        if most is None or held(after, tenant) <= most:
            continue
        assert held(after, tenant) <= held(view, tenant)
        assert not any(view.models[new.model].tenant == tenant for new in decided.bind)


def settle(view: View) -> View:
    """Plans until nothing changes. The next plan changes nothing, unless this one gave a model up:
    what that asked for is then left to others, which their shares of it are reckoned from."""
    first = plan(view, POLICY)
    while first.changes:
        view = applied(view, first)
        again = plan(view, POLICY)
        assert first.retire or not again.changes, f"{first}\nthen {again}"
        first = again
    return view


@given(shared_views())
@settings(max_examples=80, deadline=None)
def test_planning_again_right_after_applying_changes_nothing(view: View) -> None:
    """Who reclaims its share is not deprived of it again, and nothing goes to and fro."""
    settle(view)


@given(shared_views())
@settings(max_examples=80, deadline=None)
def test_the_other_laws_hold_between_tenants(view: View) -> None:
    """No worker over its budget; what waits is placed, or refused with a reason; a plan passes its
    own verification."""
    decided = plan(view, POLICY)
    after = applied(view, decided)
    for worker in after.workers.values():
        assert not worker.budget_bytes or served(after, worker) or not worker.assigned
    placed = {model for worker in after.workers.values() for model in worker.assigned}
    refused = {no.model for no in decided.refused}
    for model in view.models:
        assert not asked(view, model) or model in placed or model in refused
    kept, refusals = verify(decided, view)
    assert not refusals
    assert (kept.bind, kept.unbind, kept.retire) == (decided.bind, decided.unbind, decided.retire)


@given(shared_views())
@settings(max_examples=80, deadline=None)
def test_what_is_asked_loses_its_last_copy_only_to_a_tenant_that_holds_less(view: View) -> None:
    """Over their shares, and after that still. So a spike pushes out nobody's busy models beyond
    its own share, and a quota that was lowered drops no request."""
    settled = settle(view)
    spiking = sorted(settled.models)[:3]
    spiked = dict(settled.models)
    for model in spiking:
        facts = spiked[model]
        demand = msgspec.structs.replace(facts.demand, need=20.0, ready=500)
        spiked[model] = msgspec.structs.replace(facts, demand=demand)
    before = msgspec.structs.replace(settled, models=spiked)
    decided = plan(before, POLICY)
    after = applied(before, decided)
    placed = {model for worker in after.workers.values() for model in worker.assigned}
    tenancy = Fleet(after, POLICY).tenancy
    for gone in decided.unbind:
        if gone.model in placed or not asked(before, gone.model):
            continue
        loser = tenancy.of(gone.model)
        prefix = "makes room for "
        assert not gone.reason.startswith("tenant"), "it holds more than it may, and is asked"
        if gone.reason.startswith(prefix):
            assert tenancy.of(gone.reason.removeprefix(prefix)) != loser


@given(shared_views(), st.data())
@settings(max_examples=60, deadline=None)
def test_the_reflex_keeps_quotas(view: View, data: st.DataObject) -> None:
    """A first request is no way around them."""
    model = data.draw(st.sampled_from(sorted(view.models)))
    decided = place_one(view, model, POLICY)
    after = applied(view, decided)
    quota = view.quotas.get(view.models[model].tenant)
    if decided.bind and quota is not None and quota.device_bytes is not None:
        assert held(after, view.models[model].tenant) <= quota.device_bytes


@given(shared_views())
@settings(max_examples=60, deadline=None)
def test_one_tenant_without_quota_is_planned_as_if_there_were_none(view: View) -> None:
    """To the last word."""
    nobody = {m: msgspec.structs.replace(f, tenant="") for m, f in view.models.items()}
    alone = {m: msgspec.structs.replace(f, tenant="a") for m, f in view.models.items()}
    quotas = {"a": Quota(share=3.0)}
    one = plan(msgspec.structs.replace(view, models=nobody, quotas={}), POLICY)
    same = plan(msgspec.structs.replace(view, models=alone, quotas=quotas), POLICY)
    assert not one.tenants
    assert one == msgspec.structs.replace(same, tenants=())


@given(
    st.lists(st.sampled_from([0.0, 0.1, 1.0, 5.0, 40.0]), min_size=1, max_size=6),
    st.data(),
    st.sampled_from([0.7, 2.8, 100.0]),
)
@settings(deadline=None)
def test_capacity_is_filled_like_water(demands, data, capacity):
    """All of it is given as long as anybody asks; nobody is given more than it asks for, and nobody
    who wants more has less over its share than another."""
    shares = [data.draw(st.sampled_from([0.5, 1.0, 4.0])) for _ in demands]
    demand, share = np.array(demands), np.array(shares)
    given_ = water_fill(demand, share, capacity)
    assert given_.sum() <= min(demand.sum(), capacity) + 1e-9
    assert given_.sum() >= min(demand.sum(), capacity) - 1e-9
    assert (given_ <= demand + 1e-12).all()
    for wants in np.flatnonzero(given_ < demand - 1e-9):
        assert (given_ / share <= given_[wants] / share[wants] + 1e-9).all()


class SharedLoop(Loop):
    """The same over time: quotas come, go and change as workers do."""

    tenants = OWNERS

    @rule(
        tenant=st.sampled_from(TENANTS[1:]),
        most=st.sampled_from([None, 1, 25, 60, 200]),
        share=st.sampled_from([0.5, 1.0, 4.0]),
    )
    def set_quota(self, tenant: str, most: int | None, share: float) -> None:
        """Somebody changes what a tenant may have."""
        self.quotas[tenant] = tenants.Quota(device_bytes=most, share=share)
        self.knowledge.bound_tenants(self.quotas)

    def _check_planned(self, before: View, after: View) -> None:
        for tenant, quota in before.quotas.items():
            had, has = held(before, tenant), held(after, tenant)
            assert quota.device_bytes is None or has <= max(quota.device_bytes, had)


TestSharedLoop = SharedLoop.TestCase
TestSharedLoop.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
