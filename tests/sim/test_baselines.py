"""Baselines: as strong as they can be within the same memory."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from shared.control import ModelReport, Report
from shared.fit import can_be_served, fit
from shared.layout import aligned
from shared.models import Case, Footprint, Placement
from sim import workloads
from sim.baselines import (
    ModelMesh,
    Periodic,
    RayServe,
    static,
    static_everywhere,
    static_replicated,
)
from sim.packing import Bin, load_of, mean_rates, replicated, single_homed
from sim.workloads import footprint

MODELS = workloads.fleet_of_models(40)
BLOCK = aligned(1)
WORKERS = workloads.fleet_of_workers(4, 15)
LOAD = workloads.stationary(MODELS, 800, duration_s=30)


def copies(assigned):
    count = {}
    for held in assigned.values():
        for model in held:
            count[model] = count.get(model, 0) + 1
    return count


def within_budget(assigned, workers, models=MODELS):
    sizes = {model.id: footprint(model) for model in models}
    return all(
        can_be_served(
            [sizes[model] for model in assigned.get(worker.name, ())],
            worker.budget_bytes,
            worker.host_bytes,
        )
        for worker in workers
    )


def test_single_homed_places_each_model_once_and_balances():
    """Each model is somewhere, and no worker's load is far from the mean."""
    decision = static(LOAD).start(MODELS, WORKERS)
    assert copies(decision.assigned) == {model.id: 1 for model in MODELS}
    bins = single_homed(MODELS, WORKERS, mean_rates(LOAD))
    loads = [each.load for each in bins]
    assert max(loads) < 1.1 * sum(loads) / len(loads)


def test_replicated_fills_the_memory_with_what_is_asked_most():
    """No worker could take one more copy of anything, and the hottest are everywhere."""
    decision = static_replicated(LOAD).start(MODELS, WORKERS)
    assert within_budget(decision.assigned, WORKERS)
    assert all(len(held) == 15 for held in decision.assigned.values())
    count = copies(decision.assigned)
    assert len(count) == 40
    hottest = max(mean_rates(LOAD).items(), key=lambda each: each[1])[0]
    assert count[hottest] == 4


def test_replicated_stays_balanced():
    """Spare copies, whose share of the requests is even, leave no worker far busier."""
    loads = [each.load for each in replicated(MODELS, WORKERS, mean_rates(LOAD))]
    assert max(loads) < 1.15 * sum(loads) / len(loads)


def test_replication_stops_where_copies_cost_more_than_they_serve():
    """Above a least load per copy, only what is asked much gets copies."""
    rates = mean_rates(LOAD)
    every = sum(len(each.models) for each in replicated(MODELS, WORKERS, rates))
    bins = replicated(MODELS, WORKERS, rates, least=0.1)
    assert 40 < sum(len(each.models) for each in bins) < every
    for model in MODELS:
        held = sum(model.id in each.models for each in bins)
        assert held == 1 or load_of(model, rates[model.id]) / (held - 1) >= 0.1


def test_everywhere_uses_both_tiers():
    """With a host tier for all models, every worker has every model; without one, what fits, and
    every model somewhere as far as there is room for all."""
    roomy = workloads.fleet_of_workers(4, 15, host_models=40)
    decision = static_everywhere(LOAD).start(MODELS, roomy)
    assert copies(decision.assigned) == {model.id: 4 for model in MODELS}
    tight = static_everywhere(LOAD).start(MODELS, WORKERS)
    assert within_budget(tight.assigned, WORKERS)
    assert len(copies(tight.assigned)) == 40


def test_limits_of_a_model_hold_for_baselines_too():
    """max_copies, a selector and anti-affinity are kept."""
    limited = msgspec.structs.replace(
        MODELS[0], manifest=msgspec.structs.replace(MODELS[0].manifest, max_copies=2)
    )
    pinned = msgspec.structs.replace(
        MODELS[1],
        manifest=msgspec.structs.replace(
            MODELS[1].manifest, placement=Placement(worker_selector={"worker": "w2"})
        ),
    )
    apart = msgspec.structs.replace(
        MODELS[2],
        manifest=msgspec.structs.replace(MODELS[2].manifest, placement=Placement(spread_by="zone")),
    )
    workers = [
        msgspec.structs.replace(worker, labels={"zone": "ab"[number % 2]})
        for number, worker in enumerate(workloads.fleet_of_workers(4, 3))
    ]
    bins = replicated([limited, pinned, apart], workers, {})
    where = {
        model.id: [each.worker.name for each in bins if model.id in each.models]
        for model in (limited, pinned, apart)
    }
    assert len(where[limited.id]) == 2
    assert where[pinned.id] == ["w2"]
    assert len(where[apart.id]) == 2
    assert {name in {"w0", "w2"} for name in where[apart.id]} == {True, False}


@pytest.mark.parametrize("host", [False, True])
def test_a_bin_agrees_with_the_one_function_of_memory(host):
    """Filling step by step answers as `shared.fit` answers of the whole."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        worker = msgspec.structs.replace(
            WORKERS[0], budget_bytes=1000 * BLOCK, host_bytes=500 * BLOCK if host else 0
        )
        bin_, held = Bin(worker), []
        for model in MODELS[:20]:
            weights, workspace = (int(each) * BLOCK for each in rng.integers(1, 400, 2))
            sized = msgspec.structs.replace(
                model, weights_bytes=weights, cases=(Case(1, 0, 0.1, workspace),)
            )
            size = Footprint(weights, workspace)
            expected = can_be_served([*held, size], worker.budget_bytes, worker.host_bytes)
            assert bin_.has_room(sized, host=host) == expected
            assert bin_.has_room(sized, host=False) == (
                fit(size, held, worker.budget_bytes) is None
            )
            if expected:
                bin_.add(sized)
                held.append(size)


def test_load_counts_the_batches_that_a_rate_collects():
    """One request a second runs alone, 5 ms each; thousands run in full batches, 1.25 ms each."""
    assert load_of(MODELS[0], 1.0) == pytest.approx(0.005)
    assert load_of(MODELS[0], 2000.0) == pytest.approx(2000 * 0.020 / 16)


def test_periodic_follows_the_last_period():
    """After a minute it packs by what was asked in that minute, and changes nothing when nothing
    changed."""
    made = workloads.drifting(
        MODELS, 800, alpha=1.2, cv=1.0, period_s=60, duration_s=180, warmup_s=0
    )
    policy = Periodic(made)
    assert policy.tick_s == 60
    policy.start(MODELS, WORKERS)
    policy.decide([], {}, 60.0)
    second = policy.decide([], {}, 120.0)
    hottest = max(mean_rates(made, 60, 120).items(), key=lambda each: each[1])[0]
    placed = dict(policy.start(MODELS, WORKERS).assigned) | dict(second.assigned)
    assert copies(placed)[hottest] == 4
    steady = Periodic(workloads.stationary(MODELS, 800, cv=0.0, duration_s=180))
    steady.start(MODELS, WORKERS)
    steady.decide([], {}, 60.0)
    assert not steady.decide([], {}, 120.0).assigned


def report(worker, now, *arrived):
    return Report(
        worker=worker, incarnation="a", seq=int(now * 10), at=now, device_kind="sim",
        device_name="", budget_bytes=1, used_bytes=0, measured_bytes=0,
        models=tuple(
            ModelReport(
                model=model, tier="device", phase="ready", bound=True,
                footprint=Footprint(1), arrived=count,
            )
            for model, count in arrived
        ),
    )  # fmt: skip


@pytest.mark.parametrize("make", [ModelMesh, RayServe])
def test_a_miss_loads_where_the_least_recently_used_goes(make):
    """A request for what is nowhere brings it in, in place of what nobody has used, once."""
    policy = make()
    workers = workloads.fleet_of_workers(2, 3)
    started = policy.start(MODELS[:10], workers)
    placed = {name: list(held) for name, held in started.assigned.items()}
    missing = next(m.id for m in MODELS[:10] if m.id not in copies(placed))
    used = [report(name, 1.0, *((model, 1) for model in held[1:])) for name, held in placed.items()]
    policy.decide(used, {}, 1.0)
    decision = policy.unrouted(missing, 1.1)
    ((name, held),) = decision.assigned.items()
    assert missing in held
    assert len(held) == 3
    assert placed[name][0] not in held
    assert not policy.unrouted(missing, 1.2).assigned


def test_modelmesh_adds_copies_each_ten_seconds():
    """A model with more than the threshold per copy and minute gets a copy, not before 10 s."""
    policy = ModelMesh()
    workers = workloads.fleet_of_workers(3, 5)
    placed = policy.start(MODELS[:6], workers).assigned
    hot = MODELS[0].id
    home = next(name for name, held in placed.items() if hot in held)
    for tick in range(1, 50):
        assert not policy.decide([report(home, tick / 5, (hot, tick * 10))], {}, tick / 5).assigned
    decision = policy.decide([report(home, 10.0, (hot, 500))], {}, 10.0)
    assert [hot in held for held in decision.assigned.values()] == [True]
    cold = ModelMesh(scale_up_rpm=1e6)
    cold.start(MODELS[:6], workers)
    assert not cold.decide([report(home, 10.0, (hot, 500))], {}, 10.0).assigned


def test_ray_serve_waits_a_second_or_two_for_its_replica():
    """A queue that nobody empties brings another copy after 1 to 2 s; one that is emptied not."""
    policy = RayServe()
    policy.start(MODELS[:6], workloads.fleet_of_workers(3, 5))
    hot, other = MODELS[0].id, MODELS[1].id
    changed = []
    for tick in range(1, 16):
        decision = policy.decide([], {hot: 9, other: tick % 2}, tick / 5)
        if decision.assigned:
            changed.append((tick / 5, decision.assigned))
    assert 1.0 <= changed[0][0] <= 2.5
    assert all(other not in list(held)[-1:] for _, each in changed for held in each.values())
    assert hot in next(iter(changed[0][1].values()))


def test_what_one_worker_cannot_carry_gets_copies_where_slots_are_few():
    """Copies are counted before anything is packed: else light models fill the workers on which
    the heaviest should have its second home."""
    models = workloads.fleet_of_models(20)
    rates = dict.fromkeys((model.id for model in models), 1.0) | {models[0].id: 2000.0}
    bins = replicated(models, workloads.fleet_of_workers(4, 6), rates)
    assert sum(models[0].id in each.models for each in bins) == 4
    assert len({name for each in bins for name in each.models}) == 20


def test_no_model_is_left_out_for_copies():
    """With just as many slots as models each has one, whatever they are asked."""
    rates = mean_rates(LOAD)
    bins = replicated(MODELS, workloads.fleet_of_workers(4, 10), rates)
    assert len({name for each in bins for name in each.models}) == 40
