"""Demand from counters: incarnations, rates over time, backlog."""

from __future__ import annotations

import math

import msgspec
import pytest

from services.placer.core.demand import DemandTracker
from services.placer.core.policy import Policy
from shared.control import ModelReport, Report
from shared.models import Footprint
from shared.names import ModelId

A = ModelId("a/1")


def report(seq, at, arrived, *, incarnation="x", worker="w1", **model):
    return Report(
        worker=worker,
        incarnation=incarnation,
        seq=seq,
        at=at,
        device_kind="cpu",
        device_name="",
        budget_bytes=1,
        used_bytes=0,
        measured_bytes=0,
        generation=1,
        models=(
            ModelReport(
                model=A, tier="device", phase="ready", bound=True, footprint=Footprint(1),
                arrived=arrived, **model,
            ),
        ),
    )  # fmt: skip


def follow(tracker, rate, *, seconds, start=0.0, every=0.25, seq=0, arrived=0, tick=0.05):
    """Feeds a steady rate; returns the time, seq and counter reached."""
    now = start
    while now < start + seconds:
        now += tick
        if round(now / tick) % round(every / tick) == 0:
            seq += 1
            arrived += round(rate * every)
        tracker.observe([report(seq, now, arrived, seconds_per_item=0.01)], {}, now)
    return now, seq, arrived


@pytest.mark.parametrize("tick", [0.01, 0.05, 0.25])
def test_a_steady_rate_is_found_whatever_the_tick(tick):
    """The averages are over time: the same at 4 cycles a second and at 100."""
    tracker = DemandTracker(Policy())
    now, _, _ = follow(tracker, 100.0, seconds=6.0, tick=tick)
    demand = tracker.demand(A, 0, 0.1, now)
    assert demand.rate_fast == pytest.approx(100, rel=0.05)
    assert demand.need == pytest.approx(1.0, rel=0.05)


def test_history_before_the_first_look_is_no_spike():
    """A placer that starts among busy workers sees their counters, not a million requests."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(1, 0.0, 1_000_000, seconds_per_item=0.01)], {}, 0.0)
    tracker.observe([report(2, 1.0, 1_000_000, seconds_per_item=0.01)], {}, 1.0)
    assert tracker.demand(A, 0, 0.1, 1.0).need == 0.0


def absent(seq, at):
    return msgspec.structs.replace(report(seq, at, 0), models=())


def test_the_history_of_a_model_that_was_left_out_of_a_report_is_no_spike():
    """Only what the worker holds of it has surely just arrived; from then on it is counted."""
    tracker = DemandTracker(Policy(fast_tau_s=0.001))
    tracker.observe([absent(1, 0.0)], {}, 0.0)
    tracker.observe([report(2, 1.0, 10_001, held=1, last_used=0.9)], {}, 1.0)
    assert tracker.demand(A, 0, 0.1, 1.0).rate_fast == pytest.approx(1)
    tracker.observe([report(3, 2.0, 10_051)], {}, 2.0)
    assert tracker.demand(A, 0, 0.1, 2.0).rate_fast == pytest.approx(50)


def test_a_forgotten_model_counts_from_its_first_requests():
    """Its worker restarts its counter: what is held counts, and tells when it was asked."""
    tracker = DemandTracker(Policy(fast_tau_s=0.001))
    tracker.observe([report(1, 0.0, 500)], {}, 0.0)
    tracker.observe([absent(2, 100.0)], {}, 100.0)
    tracker.observe([report(3, 101.0, 3, held=3, last_used=100.5)], {}, 101.0)
    assert tracker.demand(A, 0, 0.1, 101.0).rate_fast == pytest.approx(3)
    tracker.observe([absent(4, 200.0)], {}, 200.0)
    tracker.observe([report(5, 201.0, 2, last_used=200.25)], {}, 201.0)
    demand = tracker.demand(A, 0, 0.1, 201.0)
    assert demand.rate_fast < 0.01
    assert demand.last_active == pytest.approx(200.25)


def test_a_restarted_worker_counts_from_zero():
    """A smaller counter under a new incarnation is that many arrivals, never negative ones."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(1, 0.0, 5000)], {}, 0.0)
    tracker.observe([report(1, 1.0, 10, incarnation="y")], {}, 1.0)
    rate = tracker.demand(A, 0, 0.1, 1.0).rate_fast
    assert 0 < rate <= 10


def test_the_same_report_is_not_counted_twice():
    """Between two heartbeats the placer looks several times."""
    tracker = DemandTracker(Policy(fast_tau_s=0.001))
    tracker.observe([report(1, 0.0, 0)], {}, 0.0)
    for step in range(1, 6):
        tracker.observe([report(2, 1.0, 100)], {}, 1.0 + step / 10)
    assert tracker.demand(A, 0, 0.1, 1.5).rate_fast == pytest.approx(100)


def test_a_rate_falls_when_requests_stop():
    """The fast one within seconds; and the model is known to have been idle since."""
    tracker = DemandTracker(Policy())
    now, seq, arrived = follow(tracker, 100.0, seconds=5.0)
    quiet, _, _ = follow(tracker, 0.0, seconds=5.0, start=now, seq=seq, arrived=arrived)
    demand = tracker.demand(A, 0, 0.1, quiet)
    assert demand.rate_fast < 2
    assert demand.last_active == pytest.approx(now, abs=0.3)


def test_backlog_is_to_be_worked_off_in_half_the_latency_target():
    """But not faster than a tick, nor than another copy could be loaded."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(1, 0.0, 0, held=10, seconds_per_item=0.01)], {A: 90}, 0.0)
    assert tracker.demand(A, 90, 2.0, 0.0).need == pytest.approx(1.0)
    assert tracker.demand(A, 90, 0.001, 0.0).need == pytest.approx(1.0 / 0.2)
    tracker.observe(
        [report(2, 1.0, 0, held=10, seconds_per_item=0.01, load_seconds=5.0)], {A: 90}, 1.0
    )
    assert tracker.demand(A, 90, 2.0, 1.0).need == pytest.approx(0.2)


def test_without_a_measurement_one_copy_must_do():
    """There is no telling what a second one would bring."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(1, 0.0, 0, held=500)], {}, 0.0)
    demand = tracker.demand(A, 500, 0.1, 0.0)
    assert demand.need == 0.0
    assert demand.backlog == 1000


def test_idleness_survives_a_new_placer():
    """The workers' own clocks tell how long ago a model was asked."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(1, 5000.0, 7, last_used=4400.0)], {}, 10.0)
    assert tracker.demand(A, 0, 0.1, 10.0).last_active == pytest.approx(10.0 - 600.0)


def test_a_worker_that_is_gone_takes_its_rate_along_but_not_the_models_memory():
    """Demand did not go with the worker: the slow average keeps it for a while."""
    tracker = DemandTracker(Policy())
    now, _, _ = follow(tracker, 100.0, seconds=5.0)
    tracker.observe([], {}, now + 0.1)
    demand = tracker.demand(A, 0, 0.1, now + 0.1)
    assert demand.rate_fast > 80
    assert demand.held == 0


@pytest.mark.parametrize(
    ("arrivals", "rate_fast"),
    [
        (50, (50 - 2 * 50**0.5) / 0.25),
        (8, 20 + (8 / 0.25 - 20) * (1 - math.exp(-0.25))),
    ],
)
def test_a_surge_counts_at_once_and_what_may_be_chance_does_not(arrivals, rate_fast):
    """One interval with ten times as many requests is no chance: all but what may be one is
    believed. A few more than usual are left to the average."""
    tracker = DemandTracker(Policy())
    for seq in range(41):
        now = seq * 0.25
        tracker.observe([report(seq, now, seq * 5)], {}, now)
    tracker.observe([report(41, now + 0.25, seq * 5 + arrivals)], {}, now + 0.25)
    found = tracker.demand(A, 0, 0.1, now + 0.25).rate_fast
    assert found == pytest.approx(rate_fast, rel=0.01)
