"""Measurements: what is estimated from them, and when they are written down."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.profile import BatchTimes, Measured
from shared.models import Profile


def test_nothing_is_known_at_first():
    """Zero is said, not guessed."""
    times = BatchTimes()
    assert times.estimate(4) == 0.0
    assert times.seconds_per_item == 0.0


def test_between_and_beyond_what_was_measured():
    """Interpolated between, by the cost of a row beyond, never below the smallest."""
    times = BatchTimes({2: 0.02, 8: 0.05})
    assert times.estimate(5) == pytest.approx(0.035)
    assert times.estimate(16) == pytest.approx(0.1)
    assert times.estimate(1) == 0.02
    assert times.seconds_per_item == pytest.approx(0.01)


@given(st.lists(st.tuples(st.integers(1, 65536), st.floats(1e-6, 10)), min_size=1, max_size=300))
def test_estimates_stay_within_what_was_seen(measured):
    """However many sizes were seen, an estimate lies among the measurements."""
    times = BatchTimes()
    for rows, seconds in measured:
        times.measured(rows, seconds)
    low, high = min(s for _, s in measured), max(s for _, s in measured)
    assert len(times.by_rows()) <= 65
    for rows in (1, measured[0][0], max(r for r, _ in measured)):
        assert low * 0.999 <= times.estimate(rows) <= high * 70_000


def test_an_estimate_gives_way_to_the_measurement():
    """Before the first load the file's size counts, or what another worker measured."""
    assert Measured(500, None).footprint.measured is False
    stored = Profile(device_kind="cpu", weights_bytes=400, workspace_bytes={8: 50})
    measured = Measured(500, stored)
    assert (measured.footprint.weights_bytes, measured.footprint.workspace_bytes) == (400, 50)
    measured.load(450, {1: 10}, {1: 0.01}, 0.2)
    assert measured.footprint.weights_bytes == 450


def test_a_profile_is_kept_first_and_when_it_drifts():
    """Within a tenth nothing is written."""
    measured = Measured(500, None)
    assert measured.to_keep("cpu") is None
    measured.load(400, {1: 10}, {1: 0.01}, 0.2)
    assert measured.to_keep("cpu") is not None
    assert measured.to_keep("cpu") is None
    for _ in range(50):
        measured.times.measured(1, 0.0105)
    assert measured.to_keep("cpu") is None
    for _ in range(50):
        measured.times.measured(1, 0.02)
    assert measured.to_keep("cpu") is not None
