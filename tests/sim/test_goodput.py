"""The search for the greatest rate, the figures of a run, and its picture."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from benchmarks import goodput as benchmark
from sim import goodput, workloads
from sim.goodput import Found, search, told
from sim.model import Change, Outcome
from sim.picture import draw
from sim.policies import POLICIES
from sim.report import bindings_over_time, over_time, percent, row, summary, table


def steps(limit):
    calls = []

    def attained(rate):
        calls.append(rate)
        return 1.0 if rate <= limit else 0.5

    return attained, calls


@pytest.mark.parametrize("limit", [37.0, 250.0, 501.0, 940.0])
@pytest.mark.parametrize("start", [20.0, 400.0, 1000.0])
def test_the_search_finds_the_edge(limit, start):
    """From any start it ends within its tolerance below the edge, in few runs."""
    attained, calls = steps(limit)
    rate, share, tried = search(attained, start, 1000.0, tolerance=0.02)
    assert limit / 1.021 <= rate <= limit
    assert share == 1.0
    assert len(tried) == len(calls) <= 16


def test_the_search_stops_at_what_the_devices_can_do():
    """Nothing above the fleet's capacity is tried, and what reaches it needs no bisection."""
    attained, calls = steps(1e9)
    rate, _, _ = search(attained, 400.0, 1000.0)
    assert rate == max(calls) == 1000.0


def test_a_policy_that_never_reaches_the_target_has_no_rate():
    """Then the search gives up at a hundredth of the capacity."""
    attained, calls = steps(0.0)
    rate, share, _ = search(attained, 400.0, 1000.0)
    assert (rate, share) == (0.0, 0.0)
    assert len(calls) < 15


def outcome(**changed):
    """Four requests of two models: two in target, one late in answering, one not answered."""
    models = workloads.fleet_of_models(2)
    workload = workloads.of_arrivals(
        "four", models, np.array([0.5, 1.0, 1.5, 3.5]), np.array([0, 1, 0, 1], dtype=np.int32), 4.0
    )
    ids = [model.id for model in models]
    base = Outcome(
        workload=workload, policy="p",
        latency=np.array([0.01, 0.2, 0.1, np.nan]),
        ending=np.array([0, 0, 0, 2], dtype=np.int32),
        busy_s={"w0": 1.0, "w1": 3.0},
        changes=(
            Change(0.1, "bound", ids[0], "w0"), Change(0.2, "loaded", ids[0], "w0"),
            Change(1.0, "bound", ids[0], "w1"), Change(2.0, "unbound", ids[0], "w0"),
        ),
        workers_over_time=((0.0, 2),),
        load_seconds=0.5,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changed)


def test_a_summary_counts_what_happened():
    """Attainment, latencies of what was answered, endings, loads and bindings."""
    found = summary(outcome())
    assert found.attainment == 0.5
    assert (found.p50_s, found.p99_s) == (0.1, pytest.approx(0.198))
    assert found.endings["refused"] == 0.25
    assert (found.loads, found.bound, found.unbound, found.workers) == (1, 2, 1, 2)
    assert found.busy == 0.5
    nothing = summary(outcome(latency=np.full(4, np.nan)))
    assert np.isnan(nothing.p99_s)
    assert "-" in row(nothing)


def test_warm_up_is_not_counted():
    """Requests before its end are in no figure of a summary."""
    warm = outcome()
    later = msgspec.structs.replace(warm.workload, warmup_s=1.2)
    assert summary(outcome(workload=later)).requests == 2
    assert summary(outcome(workload=later)).attainment == 0.5


def test_attainment_over_time_has_gaps_where_nothing_came():
    """Per second: all in target, half of two, none came, not answered."""
    at, share = over_time(outcome())
    assert list(at) == [0, 1, 2, 3]
    assert share[[0, 1, 3]].tolist() == [1.0, 0.5, 0.0]
    assert np.isnan(share[2])


def test_bindings_over_time_follow_changes():
    """Up at each binding, down at each that ends."""
    made = outcome()
    at, count = bindings_over_time(made, made.workload.models[0].id)
    assert (at.tolist(), count.tolist()) == ([0.0, 0.1, 1.0, 2.0], [0, 1, 2, 1])


def test_a_table_is_told_in_columns():
    """All lines of a column are as wide as its widest."""
    lines = table(["a", "bb"], [["long", "1"], ["x", "100"]]).splitlines()
    assert lines == ["a      bb", "----  ---", "long    1", "x     100"]


def test_almost_all_is_not_all():
    """99.999 % is not shown as 100 %."""
    assert [percent(share) for share in (1.0, 0.99999, 0.5)] == ["100.0 %", "99.999 %", "50.0 %"]


def test_a_picture_is_drawn(tmp_path):
    """Of one or of several outcomes, also where a model was never bound."""
    draw(tmp_path / "p.png", [outcome(), outcome(policy="other", changes=())])
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_found_rates_are_told_against_the_static_one():
    """One line per setting, and how many times the single-homed rate each policy reaches."""
    common = {"setting": "s", "attainment": 1.0, "tried": (), "wall_s": 1.0}
    text = told([
        Found(policy="static", rate=100.0, **common), Found(policy="roost", rate=250.0, **common)
    ])  # fmt: skip
    assert "250 (2.50x)" in text


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_an_easy_load(policy):
    """At a tenth of what the devices can do, all of them answer everything in target, on the same
    simulated workers."""
    setting = goodput.drifting(2, 12, models=10, duration_s=15.0)
    made = goodput.outcome(setting, policy, 0.1 * setting.capacity)
    assert made.attainment() >= 0.99
    assert made.policy == policy


def test_the_search_runs_the_simulator():
    """Every policy is given the same requests; a rate at the edge was tried on both sides."""
    setting = goodput.drifting(2, 10, models=10, duration_s=12.0)
    found = goodput.goodput(setting, "static", tolerance=0.2)
    assert 0 < found.rate <= setting.capacity
    assert found.attainment >= 0.99
    again = goodput.goodput(setting, "static", tolerance=0.2)
    assert again.tried == found.tried


def test_the_benchmark_compares_with_the_best_static_placements():
    """Its rows hold Roost's rate over both static ones, with the reach of N3."""
    setting = goodput.drifting(2, 10, models=8, duration_s=11.0)
    single, spread, *rates = benchmark.compare(setting, "small", 1.6, 1.0)
    assert (single.reach, spread.reach) == (1.6, 1.0)
    by_name = {figure.name: figure.value for figure in rates}
    static = by_name["small: static, single-homed"]
    assert static > 0
    assert single.value == pytest.approx(by_name["small: Roost"] / static)
    assert spread.value <= single.value + 1e-9
