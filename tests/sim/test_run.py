"""The simulator as a whole: what it says is what the given times add up to."""

from __future__ import annotations

import numpy as np
import pytest

from services.placer.core.policy import Policy
from sim.model import ENDINGS, Outcome
from sim.placings import Roost
from sim.run import Autoscaler, FleetEvent, Settings, run
from sim.settings import BROKER_HOP_S, HANDOVER_S, TURN_S
from tests.sim.rig import MIB, Fixed, joined, model, poisson, requests, worker

WAY_S = 2 * BROKER_HOP_S + 2 * HANDOVER_S
"""To the device and back, at least; at most one turn of the worker's loop more."""


def endings(outcome: Outcome) -> dict[str, int]:
    counts = np.bincount(outcome.ending, minlength=len(ENDINGS))
    return {name: int(count) for name, count in zip(ENDINGS, counts, strict=True) if count}


def story(outcome: Outcome, *whats: str) -> list[tuple[str, str]]:
    """Models and workers of these changes."""
    return [(each.model, each.worker) for each in outcome.changes if each.what in whats]


def rough_day(seed: int = 3) -> Outcome:
    """Two models more than fit, and everything that can happen to a worker."""
    models = [model(n, mib=10) for n in range(8)]
    fleet = [worker(n, room_mib=31, host_mib=20) for n in range(3)]
    events = [
        FleetEvent(at=2.0, what="kill", worker="w0"),
        FleetEvent(at=3.0, what="kill_engine", worker="w1"),
        FleetEvent(at=4.0, what="add", worker="w9", spec=worker(9, room_mib=31, host_mib=20)),
        FleetEvent(at=6.0, what="drain", worker="w2"),
    ]
    workload = poisson(models, [40.0, 30.0, 20.0, 10.0, 5.0, 4.0, 2.0, 1.0], end=8.0, seed=1)
    return run(workload, fleet, Roost(), seed=seed, events=events)


# --- it is what it says ---------------------------------------------------------------------


def test_the_same_arguments_give_the_same_bytes():
    """Twice the same run is the same to the last bit; another seed is another run."""
    first, again, other = rough_day(), rough_day(), rough_day(seed=4)

    def told(outcome: Outcome):
        return outcome.latency.tobytes(), outcome.ending.tobytes(), outcome.changes, outcome.events

    assert told(first) == told(again)
    assert told(first) != told(other)


def test_every_request_ends_exactly_once_whatever_happens_to_workers():
    """Killed, drained, without its engine: no request is lost."""
    outcome = rough_day()
    assert endings(outcome) == {"answered": len(outcome.workload.times)}
    assert (outcome.latency > 0).all()


def test_time_never_goes_back():
    """Neither in what is kept of a run, nor for a placing, nor in reports."""
    models = [model(n) for n in range(2)]
    placing = Fixed({"w0": models})
    outcome = run(poisson(models, [50.0, 50.0], end=2.0), [worker()], placing)
    at = [change.at for change in outcome.changes]
    ticks = [now for now, _ in placing.seen]
    said = [report.at for _, reports in placing.seen for report in reports]
    assert at == sorted(at)
    assert ticks == sorted(ticks)
    assert np.diff(ticks) == pytest.approx(placing.tick_s)
    assert said == sorted(said)
    assert all(report.at <= now for now, reports in placing.seen for report in reports)


# --- one worker -----------------------------------------------------------------------------


def test_one_request_takes_its_batch_and_its_way():
    """Nothing but what was measured and the named constants."""
    only = model(seconds={1: 0.007})
    outcome = run(requests([only], (1.0, 0)), [worker()], Fixed({"w0": [only]}))
    assert outcome.latency[0] == pytest.approx(0.007 + WAY_S + TURN_S)
    assert outcome.busy_s == {"w0": 0.007}


def test_a_slow_device_takes_longer():
    only = model(seconds={1: 0.007})
    outcome = run(requests([only], (1.0, 0)), [worker(speed=0.5)], Fixed({"w0": [only]}))
    assert outcome.latency[0] == pytest.approx(0.014 + WAY_S + TURN_S)


def test_waiting_is_that_of_a_queue_with_random_arrivals_and_a_fixed_service():
    """M/D/1: the mean wait is rho D / (2 (1 - rho))."""
    service, utilization = 0.010, 0.7
    only = model(seconds={1: service}, max_batch_size=0)
    workload = poisson([only], [utilization / service], begin=1.0, end=201.0, seed=5)
    outcome = run(workload, [worker()], Fixed({"w0": [only]}))
    waited = outcome.latency.mean() - service - WAY_S
    # 14,000 arrivals are not 70 a second exactly, and the device idles for a handover.
    utilization = len(workload.times) / 200 * service
    assert waited == pytest.approx(utilization * service / (2 * (1 - utilization)), rel=0.10)
    assert outcome.busy_s["w0"] == pytest.approx(utilization * 200)


def test_what_arrives_together_runs_together():
    """64 at once are four batches of 16, and not 64 of one."""
    only = model(seconds={1: 0.005, 16: 0.020})
    outcome = run(requests([only], *[(1.0, 0)] * 64), [worker()], Fixed({"w0": [only]}))
    assert outcome.busy_s["w0"] == pytest.approx(4 * 0.020)
    assert outcome.latency.max() == pytest.approx(4 * 0.020 + WAY_S + TURN_S, abs=0.001)


def test_a_swap_takes_its_time():
    """What was swapped out is back after a copy; what is on the device is not waited for."""
    models = [model(n, mib=10, seconds={1: 0.005}, swap_seconds=0.030) for n in range(2)]
    fleet = [worker(room_mib=10, host_mib=20)]
    asked = requests(models, (5.0, 0), (6.0, 1), (7.0, 0), (8.0, 0))
    outcome = run(asked, fleet, Fixed({"w0": models}))
    warm = 0.005 + WAY_S + TURN_S
    assert outcome.latency[3] == pytest.approx(warm)
    for swapped in (1, 2):
        extra = outcome.latency[swapped] - warm
        assert extra == pytest.approx(0.030, abs=3 * HANDOVER_S)


def test_loads_leave_the_device_alone():
    """While another model comes from the disk for seconds, batches run as always."""
    busy, coming = model(0, seconds={1: 0.005}), model(1, load_seconds=2.0)
    asked = requests([busy, coming], *[(0.5 + 0.05 * n, 0) for n in range(30)])
    outcome = run(asked, [worker()], Fixed({"w0": [busy, coming]}))
    assert outcome.latency.max() == pytest.approx(0.005 + WAY_S + TURN_S)
    assert not [each for each in outcome.changes if each.model == coming.id]


@pytest.mark.parametrize("host_mib", [0, 40])
def test_no_device_holds_more_than_its_budget(host_mib):
    """By the engine's own count, at every report; and the core believes the same at rest."""
    models = [model(n, mib=10, workspace_bytes=1 * MIB) for n in range(7)]
    placing = Fixed({"w0": models})
    workload = poisson(models, [5.0] * 7, end=5.0)
    fleet = [worker(room_mib=35, host_mib=host_mib)]
    outcome = run(workload, fleet, placing, settings=Settings(timeout_s=2.0))
    reports = [report for _, seen in placing.seen for report in seen]
    assert reports
    for report in reports:
        assert 0 <= report.measured_bytes <= report.budget_bytes
        assert 0 <= report.host_used_bytes <= report.host_budget_bytes
    at_rest = reports[-1]
    assert at_rest.measured_bytes == at_rest.used_bytes > 0
    swapped = bool(story(outcome, "evicted"))
    assert swapped == bool(host_mib)


def test_batches_may_vary_about_what_was_measured():
    """By the seed; their mean is what was measured."""
    only = model(seconds={1: 0.010}, max_batch_size=0)
    workload = poisson([only], [30.0], begin=0.5, end=60.0)

    def simulated(seed: int) -> Outcome:
        settings = Settings(service_cv=0.5)
        return run(workload, [worker()], Fixed({"w0": [only]}), seed=seed, settings=settings)

    first, again, other = simulated(1), simulated(1), simulated(2)
    assert first.busy_s["w0"] == pytest.approx(0.010 * len(workload.times), rel=0.05)
    assert first.busy_s == again.busy_s
    assert first.busy_s != other.busy_s


def test_what_nobody_has_measured_is_found_out():
    """Without profiles the first load estimates, and what it measures goes into the reports."""
    models = [model(n, mib=10, workspace_bytes=MIB, load_seconds=0.3) for n in range(3)]
    workload = poisson(models, [20.0] * 3, begin=0.5, end=3.0)
    placing = Fixed({"w0": models})
    outcome = run(workload, [worker()], placing, settings=Settings(profiled=False))
    assert endings(outcome) == {"answered": len(workload.times)}
    first, last = placing.seen[1][1][0], placing.seen[-1][1][0]
    assert not any(each.footprint.measured for each in first.models)
    assert [each.footprint.measured for each in last.models] == [True] * 3
    assert {each.footprint.workspace_bytes for each in last.models} == {MIB}


# --- time that is over ----------------------------------------------------------------------


def test_what_nobody_answers_in_time_is_late():
    """Whether it waits in a queue that nobody consumes, or behind others."""
    models = [model(0, seconds={1: 0.5}, max_batch_size=0), model(1)]
    asked = requests(models, (1.0, 0), (1.0, 0), (1.0, 0), (1.0, 0), (1.0, 1))
    placing = Fixed({"w0": models[:1]})
    outcome = run(asked, [worker()], placing, settings=Settings(timeout_s=1.2))
    assert [ENDINGS[ending] for ending in outcome.ending] == [
        "answered", "answered", "late", "late", "late",
    ]  # fmt: skip
    assert np.isnan(outcome.latency[2:]).all()
    assert placing.unrouted_at == [(1.0, models[1].id)]


def test_a_deadline_may_be_the_models_target():
    """Then nothing is computed that would be late."""
    only = model(seconds={1: 0.08}, max_batch_size=0, target_ms=100)
    asked = requests([only], (1.0, 0), (1.0, 0))
    settings = Settings(timeout_targets=1.0)
    outcome = run(asked, [worker()], Fixed({"w0": [only]}), settings=settings)
    assert endings(outcome) == {"answered": 1, "late": 1}
    assert outcome.attainment() == 0.5


# --- the placer in it -----------------------------------------------------------------------


def test_a_first_request_is_placed_by_the_reflex():
    """It waits for a load and not for a tick."""
    only = model(load_seconds=0.05)
    outcome = run(requests([only], (1.03, 0)), [worker()], Roost())
    assert outcome.latency[0] < 0.05 + 0.005 + 0.010


def test_a_spike_gets_a_second_binding_within_a_tick_and_a_load():
    """From the first request too many to the second worker's consumer; nobody else's bindings
    change."""
    models = [model(n, load_seconds=0.1) for n in range(5)]
    usual = poisson(models, [30.0] + [5.0] * 4, end=12.0, seed=2)
    spike = poisson(models, [900.0], begin=6.0, end=12.0, seed=3)
    placing = Roost()
    tick_s = placing.tick_s
    outcome = run(joined(usual, spike), [worker(0), worker(1)], placing, seed=1)
    later = [each for each in outcome.changes if each.at >= 6.0 and each.what == "bound"]
    assert {each.model for each in later} == {models[0].id}
    assert later[0].at - 6.0 <= tick_s + 0.1 + 0.05
    assert not [each for each in outcome.changes if each.at >= 6.0 and each.what == "unbound"]


class _Watched(Roost):
    """Keeps, of each cycle, whether it left something over and how soon the next one comes."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.cycles: list[tuple[bool, float]] = []

    def decide(self, reports, depths, now):
        decision = super().decide(reports, depths, now)
        self.cycles.append((self.knowledge.last_plan.pace.unfinished, self.tick_s))
        return decision


def test_what_one_planning_put_off_has_its_turn_at_once():
    """As in the service: the next cycle does not wait for its tick."""
    models = [model(n, min_copies=1) for n in range(20)]
    placing = _Watched(Policy(work_per_tick=6))
    outcome = run(requests(models, (0.5, 0)), [worker()], placing)
    assert len(story(outcome, "bound")) == len(models)
    over = [tick_s for unfinished, tick_s in placing.cycles if unfinished]
    assert len(over) >= 3
    assert set(over) == {0.0}
    assert placing.cycles[-1][1] > 0


def test_a_killed_workers_requests_are_answered_by_another():
    """Once its report has expired, which nobody can know sooner."""
    models = [model(n) for n in range(4)]
    workload = poisson(models, [20.0] * 4, end=12.0)
    settings = Settings()
    events = [FleetEvent(at=5.0, what="kill", worker="w0")]
    fleet = [worker(0), worker(1)]
    outcome = run(workload, fleet, Roost(), settings=settings, events=events)
    assert endings(outcome) == {"answered": len(workload.times)}
    lost = {name for name, where in story(outcome, "bound") if where == "w0"}
    moved = {name for name, where in story(outcome, "bound") if where == "w1"}
    assert lost
    assert lost <= moved
    assert outcome.latency.max() < settings.report_ttl_s + 1.0
    assert outcome.workers_over_time[-1] == (5.0, 1)


def test_the_placer_learns_what_nobody_has_measured():
    models = [model(n, mib=10) for n in range(6)]
    workload = poisson(models, [20.0] * 6, end=4.0)
    fleet = [worker(n, room_mib=31) for n in range(2)]
    placing = Roost(profiled=False)
    outcome = run(workload, fleet, placing, settings=Settings(profiled=False))
    assert endings(outcome) == {"answered": len(workload.times)}
    assert all(active.known["sim"].measured for active in placing.knowledge.active.values())


def test_a_worker_that_joins_late_takes_its_part():
    """All models stand on the first by then, none with enough demand for a second copy."""
    models = [model(n) for n in range(12)]
    workload = poisson(models, [22.0] * 12, end=20.0)
    events = [FleetEvent(at=1.0, what="add", worker="w1", spec=worker(1))]
    outcome = run(workload, [worker(0)], Roost(), events=events)
    assert endings(outcome) == {"answered": len(workload.times)}
    moved = {name for name, where in story(outcome, "bound") if where == "w1"}
    assert len(moved) >= 2
    assert outcome.busy_s["w1"] > 0.2 * outcome.busy_s["w0"]


def test_a_drained_worker_drops_nothing():
    """What it holds goes back or is finished; it leaves; and the others take over."""
    models = [model(n) for n in range(4)]
    workload = poisson(models, [50.0] * 4, end=6.0)
    events = [FleetEvent(at=3.0, what="drain", worker="w0")]
    outcome = run(workload, [worker(0), worker(1)], Roost(), events=events)
    assert endings(outcome) == {"answered": len(workload.times)}
    assert [worker for _, worker in story(outcome, "worker_removed")] == ["w0"]
    assert outcome.latency.max() < 0.5


def test_a_fleet_follows_what_is_wanted():
    """It grows under load, a start-up later, and no request is lost as it shrinks again."""
    models = [model(n, seconds={1: 0.01, 16: 0.04}) for n in range(4)]
    quiet = poisson(models, [4.0] * 4, end=60.0, seed=1)
    busy = poisson(models, [120.0] * 4, begin=20.0, end=30.0, seed=2)
    scaler = Autoscaler(template=worker(), start_s=2.0, most=4)
    placing = Roost(Policy(shrink_after_s=10.0))
    outcome = run(joined(quiet, busy), [worker()], placing, autoscaler=scaler)
    sizes = [count for _, count in outcome.workers_over_time]
    first = next(at for at, count in outcome.workers_over_time if count == 2)
    assert first < 20.0 + 2.0 + 3.0
    assert max(sizes) >= 2
    assert sizes[-1] < max(sizes)
    assert endings(outcome) == {"answered": len(outcome.workload.times)}


def test_an_autoscaler_needs_a_number_to_follow():
    only = model()
    scaler = Autoscaler(template=worker(), start_s=1.0)
    with pytest.raises(ValueError, match="how many workers"):
        run(requests([only]), [worker()], Fixed({}), autoscaler=scaler)


def test_events_that_contradict_the_fleet_are_refused():
    only = model()
    events = [FleetEvent(at=0.5, what="kill", worker="w7")]
    with pytest.raises(ValueError, match="no worker w7 at"):
        run(requests([only], (1.0, 0)), [worker()], Fixed({}), events=events)
