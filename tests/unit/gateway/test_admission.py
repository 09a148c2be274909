"""Who may enter the gateway, and when the others may come back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.admission import RETRY_AFTER_MAX_S, Admission


def full(limit: int = 4, now: float = 0.0) -> Admission:
    admission = Admission(limit, 1000)
    for _ in range(limit):
        assert admission.enter("bert", now) is None
    return admission


def test_a_model_is_bounded_and_others_are_not_affected():
    """One model's flood is turned away; another model enters."""
    admission = full()
    rejection = admission.enter("bert", 0.0)
    assert rejection is not None
    assert rejection.reason == "model_full"
    assert "'bert'" in rejection.message
    assert admission.enter("whisper", 0.0) is None


def test_room_comes_back_with_each_that_leaves():
    """A departure makes room for exactly one."""
    admission = full()
    admission.leave("bert", 1.0, answered=True)
    assert admission.enter("bert", 1.0) is None
    assert admission.enter("bert", 1.0) is not None


def test_retry_after_follows_the_drain_rate():
    """40 in flight that leave at 10 a second are gone after about 4 seconds."""
    admission = full(limit=40)
    now = 0.0
    for _ in range(600):
        now += 0.1
        admission.leave("bert", now, answered=True)
        assert admission.enter("bert", now) is None
    assert admission.retry_after_s("bert", now) in {4, 5}


def test_retry_after_is_right_soon_after_the_start():
    """The average is corrected for its short past: one second at 10/s counts as 10/s."""
    admission = full(limit=40)
    for step in range(1, 11):
        admission.leave("bert", step / 10, answered=True)
        admission.enter("bert", step / 10)
    assert admission.retry_after_s("bert", 1.0) in {4, 5}


def test_a_model_that_answers_nothing_is_waited_for_as_long_again():
    """Without a departure there is no rate: come back after as long as it has been, bounded."""
    admission = full()
    assert admission.retry_after_s("bert", 0.1) == 1
    assert admission.retry_after_s("bert", 7.0) == 7
    assert admission.retry_after_s("bert", 900.0) == RETRY_AFTER_MAX_S


def test_requests_that_failed_do_not_look_like_throughput():
    """Time-outs leaving at speed must not promise room."""
    admission = full(limit=10)
    for step in range(5):
        admission.leave("bert", 10 + step / 100, answered=False)
    assert admission.retry_after_s("bert", 10.1) > 5


def test_a_tenant_is_bounded_over_all_models_and_others_are_not_affected():
    """Who names nobody has no such bound; told when to come back by the tenant's own rate."""
    admission = Admission(10, 100, 2)
    assert admission.enter("a", 0.0, "t") is None
    assert admission.enter("b", 0.0, "t") is None
    refused = admission.enter("c", 5.0, "t")
    assert (refused.reason, refused.retry_after_s) == ("tenant_full", 5)
    assert admission.enter("c", 5.0, "u") is None
    assert all(admission.enter("c", 5.0) is None for _ in range(5))
    admission.validate()
    admission.leave("a", 6.0, answered=True, tenant="t")
    assert admission.enter("c", 6.0, "t") is None
    admission.validate()


def test_a_refused_request_counts_for_nobody():
    """Whichever bound it met."""
    admission = Admission(1, 100, 1)
    assert admission.enter("a", 0.0, "t") is None
    assert admission.enter("a", 0.0, "u").reason == "model_full"
    assert admission.enter("b", 0.0, "t").reason == "tenant_full"
    assert admission.enter("b", 0.0, "u") is None
    admission.validate()


def test_bytes_are_bounded_and_given_back():
    """What would not fit takes nothing; what is dropped makes room."""
    admission = Admission(10, 100)
    assert admission.hold(60) is None
    rejection = admission.hold(41)
    assert rejection is not None
    assert rejection.reason == "bytes_full"
    assert admission.hold(40) is None
    admission.drop(100)
    assert admission.held_bytes == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 5)), max_size=60))
def test_any_order_keeps_the_laws(steps):
    """Entries and departures in any order keep the counters true."""
    admission = Admission(3, 100)
    inside: list[str] = []
    now = 0.0
    for model, enters, seconds in steps:
        now += seconds
        if enters:
            if admission.enter(model, now) is None:
                inside.append(model)
        elif model in inside:
            inside.remove(model)
            admission.leave(model, now, answered=True)
        admission.validate()
        assert 1 <= admission.retry_after_s(model, now) <= RETRY_AFTER_MAX_S
    assert admission.in_flight == len(inside)
