"""What one tenant may take of a gateway."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.admission import Admission
from services.gateway.core.quotas import Bucket, Quotas
from shared.tenants import Quota


def test_a_rate_lets_a_seconds_worth_in_at_once_and_then_its_pace():
    """Whoever is refused is told when the next one may come."""
    quotas = Quotas()
    quotas.set({"a": Quota(requests_per_s=2.0)}, 0.0)
    assert [quotas.spend("a", 0.0) is None for _ in range(3)] == [True, True, False]
    assert quotas.spend("a", 0.4).retry_after_s == 1
    assert quotas.spend("a", 0.5) is None
    assert quotas.spend("b", 0.0) is None, "nobody else notices"
    assert quotas.spend("", 0.0) is None


def test_a_slow_rate_is_told_in_whole_seconds():
    """One request in 10 s: the second waits out what is left of them."""
    quotas = Quotas()
    quotas.set({"a": Quota(requests_per_s=0.1)}, 0.0)
    assert quotas.spend("a", 0.0) is None
    refused = quotas.spend("a", 2.5)
    assert (refused.reason, refused.retry_after_s) == ("tenant_rate", 8)
    assert "0.1 times a second" in refused.message
    assert quotas.spend("a", 10.0) is None


def test_a_changed_rate_holds_at_once():
    """Down, up, and taken back, without a restart and without a fresh second's worth."""
    quotas = Quotas()
    quotas.set({"a": Quota(requests_per_s=100.0)}, 0.0)
    quotas.set({"a": Quota(requests_per_s=1.0)}, 0.0)
    assert [quotas.spend("a", 0.0) is None for _ in range(2)] == [True, False]
    quotas.set({"a": Quota(requests_per_s=50.0)}, 0.0)
    assert quotas.spend("a", 0.0) is not None
    quotas.set({}, 0.0)
    assert all(quotas.spend("a", 0.0) is None for _ in range(100))
    quotas.validate()


def test_bytes_of_one_tenant_are_bounded():
    """Another has its own room; what is given back can be taken again."""
    admission = Admission(10, 1000)
    admission.set_quotas({"a": Quota(request_bytes=100)}, 0.0)
    assert admission.hold(60, "a") is None
    refused = admission.hold(60, "a")
    assert (refused.reason, admission.held_bytes) == ("tenant_bytes", 60)
    assert admission.hold(60, "b") is None
    assert admission.hold(60) is None
    admission.drop(60, "a")
    assert admission.hold(100, "a") is None
    for tenant, nbytes in (("a", 100), ("b", 60), ("", 60)):
        admission.drop(nbytes, tenant)
    assert admission.held_bytes == 0
    admission.validate()


def test_a_quotas_concurrency_takes_the_place_of_the_gateways():
    """Above or below it; and what is under way when it changes stays."""
    admission = Admission(100, 1000, 2)
    admission.set_quotas({"a": Quota(concurrency=1), "b": Quota(concurrency=3)}, 0.0)
    assert [admission.enter("m", 0.0, "a") is None for _ in range(2)] == [True, False]
    assert [admission.enter("m", 0.0, "b") is None for _ in range(4)] == [True] * 3 + [False]
    assert [admission.enter("m", 0.0, "c") is None for _ in range(3)] == [True, True, False]
    admission.set_quotas({"b": Quota(concurrency=1)}, 0.0)
    assert admission.enter("m", 0.0, "b").reason == "tenant_full"
    for _ in range(3):
        admission.leave("m", 1.0, answered=True, tenant="b")
    assert admission.enter("m", 1.0, "b") is None
    admission.validate()


@given(
    rate=st.floats(0.01, 1000),
    gaps=st.lists(st.floats(0, 5), min_size=1, max_size=60),
)
def test_never_more_than_the_rate_and_never_refused_below_it(rate, gaps):
    """Over any stretch at most a bucket full and the rate's share of it; and whoever waits as long
    as was said, gets in."""
    bucket, now = Bucket(rate, 0.0), 0.0
    for taken, gap in enumerate(gaps, start=1):
        now += gap
        wait_s = bucket.take(now)
        if wait_s:
            now += wait_s
            assert bucket.take(now) == 0.0
        assert taken <= max(rate, 1.0) + rate * now + 1e-6
