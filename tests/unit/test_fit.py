"""The one question of memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.fit import can_be_served, fit, fit_tiers, used_bytes
from shared.layout import Share
from shared.models import Footprint

BACKBONE = (Share("backbone", 80),)
footprints = st.builds(
    lambda own, workspace, keys, pinned, copyable: Footprint(
        own + sum(size for _, size in keys),
        workspace,
        shares=tuple(Share(key, size) for key, size in sorted(keys)),
        pinned=pinned,
        copyable=copyable,
    ),
    own=st.integers(0, 40),
    workspace=st.integers(0, 20),
    keys=st.sets(st.sampled_from([("a", 10), ("b", 30), ("c", 7)])),
    pinned=st.sampled_from([False, False, True]),
    copyable=st.sampled_from([True, True, False]),
)


def test_weights_add_up_and_the_greatest_workspace_counts_once():
    """One batch runs at a time."""
    assert used_bytes([Footprint(10, 5), Footprint(20, 7), Footprint(1)]) == 38


def test_what_is_shared_counts_once():
    """Whoever has it; and a newcomer only needs what is its own."""
    tunes = [Footprint(90, shares=BACKBONE)] * 3
    assert used_bytes(tunes) == 110
    assert fit(tunes[0], tunes, 120) is None
    assert str(fit(tunes[0], tunes, 119)) == "no room on the device: needs 10 bytes, 9 are free"


def test_with_a_host_tier_only_the_sum_of_both_counts():
    """And that each fits the device alone."""
    held = [Footprint(60)] * 3
    assert fit_tiers(Footprint(60), held, 100, 140) is None
    assert str(fit_tiers(Footprint(60), held, 100, 130)) == (
        "no room on the device and in the host's memory: needs 60 bytes, 50 are free"
    )
    assert str(fit_tiers(Footprint(101), (), 100, 900)) == (
        "larger than the whole device budget: needs 101 bytes, 100 are free"
    )


def test_what_never_leaves_the_device_leaves_room_for_the_others():
    """Else they could never run."""
    state = Footprint(50, pinned=True)
    assert fit_tiers(Footprint(50), [state, Footprint(40)], 100, 100) is None
    assert str(fit_tiers(Footprint(51), [state, Footprint(40)], 100, 100)) == (
        "no room on the device beside what never leaves it: needs 51 bytes, 50 are free"
    )
    assert fit_tiers(Footprint(61, pinned=True), [Footprint(40), Footprint(1)], 100, 100)


def test_what_can_have_no_copy_counts_on_the_device_alone():
    """However much of the host's memory is free: each request would cost a load from the disk."""
    whole = Footprint(50, copyable=False)
    assert fit_tiers(whole, [whole, Footprint(100)], 100, 400) is None
    assert str(fit_tiers(whole, [whole, whole, Footprint(100)], 100, 400)) == (
        "no room on the device for what cannot wait in the host's memory: "
        "needs 50 bytes, 0 are free"
    )
    assert fit_tiers(Footprint(60), [whole, whole], 100, 400) is None, "it takes turns with them"


@given(st.lists(footprints, max_size=8), footprints, st.integers(1, 150), st.integers(0, 150))
def test_without_a_host_tier_it_is_the_question_of_the_device(held, newcomer, budget, host):
    """A host tier only adds; and a yes keeps its promise."""
    assert fit_tiers(newcomer, held, budget, 0) == fit(newcomer, held, budget)
    refusal = fit_tiers(newcomer, held, budget, host)
    if fit(newcomer, held, budget) is None:
        assert refusal is None
    assert (refusal is None) == can_be_served([*held, newcomer], budget, host)
    if refusal is None:
        assert used_bytes([*held, newcomer]) <= budget + host
        assert used_bytes([newcomer]) <= budget
