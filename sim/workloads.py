"""Workloads by recipe: models, and every request beforehand. The same seed gives the same one.

| recipe | what it is like | source |
|---|---|---|
| `stationary` | popularity by a power law, gaps by a Gamma distribution | AlpaServe's and MuxServe's synthetic traces |
| `drifting` | the same, and who is popular is drawn again every period | ours |
| `stepping` | the same at a steady load, and one model of middle rank asks for many times more | ours |
| `azure_like` | 100 functions per model, rates over eight decades, timers, Poisson and on/off | shape after *Serverless in the Wild* (Azure Functions 2019), striped over models as AlpaServe does; the mix of classes is an assumption |
| `ramp` | a fixed rate spread over ever more models | Clockwork's "bursty" |
| `oversubscribed` | a power law over a multiple of the models that fit | ours |
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from shared.layout import aligned
from shared.models import Case, Footprint, Manifest, Profile
from sim.arrivals import Rate, constant, pieces, roll
from sim.model import Floats, Ints, SimModel, SimWorker, Workload

WEIGHTS = 96 << 20
"""Bytes of each model of the standard fleet; a whole number of a device's blocks."""


def affine(base_s: float, per_row_s: float, rows: int) -> tuple[Case, ...]:
    """A batch of b takes `base_s` + b x `per_row_s`, up to `rows`."""
    sizes = (1, rows) if rows > 1 else (1,)
    return tuple(Case(size, 0, base_s + size * per_row_s) for size in sizes)


def fleet_of_models(
    count: int,
    *,
    cases: tuple[Case, ...] = affine(0.004, 0.001, 16),
    weights_bytes: int = WEIGHTS,
    load_s: tuple[float, float] = (0.005, 0.020),
    target_ms: float = 100.0,
    seed: int = 0,
) -> tuple[SimModel, ...]:
    """`count` models that differ only in what loading them costs, uniform in `load_s` (s), from
    the disk and from the host's memory alike. The defaults are those of the goodput benchmark."""
    loads = np.random.default_rng((seed, 11)).uniform(*load_s, count)
    return tuple(
        SimModel(
            manifest=Manifest(
                name=f"m{number:05d}",
                version=1,
                digest="sha256:" + f"{number:064x}",
                size_bytes=weights_bytes,
                created_at=0.0,
                max_batch_size=max(case.rows for case in cases),
                target_ms=target_ms,
            ),
            cases=cases,
            weights_bytes=weights_bytes,
            load_seconds=float(load),
            swap_seconds=float(load),
            architecture="a",
        )
        for number, load in enumerate(loads)
    )


def measured_models(
    count: int, profile: Profile, *, target_ms: float, max_batch_size: int = 0
) -> tuple[SimModel, ...]:
    """`count` models, each as a worker measured one (a profile of a repository). Raises
    `ValueError` when the profile says nothing of how long batches take."""
    cases = tuple(case for case in profile.cases if case.seconds > 0 and case.size == 0)
    if not cases:
        raise ValueError("the profile has no measured batches (of an unpadded model)")
    rows = max_batch_size or max(case.rows for case in cases)
    made = fleet_of_models(
        count, cases=cases, weights_bytes=profile.weights_bytes, target_ms=target_ms
    )
    return tuple(
        msgspec.structs.replace(
            model,
            manifest=msgspec.structs.replace(model.manifest, max_batch_size=rows),
            load_seconds=profile.load_seconds,
            swap_seconds=profile.swap_seconds or profile.load_seconds,
        )
        for model in made
    )


def fleet_of_workers(
    count: int, cap: int, *, weights_bytes: int = WEIGHTS, host_models: int = 0
) -> tuple[SimWorker, ...]:
    """`count` workers, each with room for `cap` models on its device, and for `host_models`
    copies in its host's memory (0: no such tier)."""
    return tuple(
        SimWorker(
            name=f"w{number}",
            budget_bytes=cap * aligned(weights_bytes),
            host_bytes=host_models * aligned(weights_bytes),
        )
        for number in range(count)
    )


def footprint(model: SimModel) -> Footprint:
    """What the model takes of a device."""
    workspace = max((case.workspace_bytes for case in model.cases), default=0)
    return Footprint(aligned(model.weights_bytes), workspace)


def power_law(models: int, alpha: float, rate: float) -> Floats:
    """Requests per second by rank, `rate` together."""
    weights: Floats = np.arange(1, models + 1, dtype=np.float64) ** -alpha
    return np.asarray(rate * weights / weights.sum())


# --- recipes ------------------------------------------------------------------------------


def stationary(
    models: Sequence[SimModel], rate: float, *, alpha: float = 0.9, cv: float = 4.0,
    duration_s: float = 60.0, warmup_s: float = 10.0, seed: int = 0,
) -> Workload:  # fmt: skip
    """`rate` requests per second over all models, by a power law of exponent `alpha`."""
    by_rank = power_law(len(models), alpha, rate)
    shuffled = _rng(seed, "ranks").permutation(by_rank)
    return _workload(
        f"stationary a={alpha:g} cv={cv:g}", models,
        (constant(float(each), duration_s) for each in shuffled),
        lambda _: cv, duration_s, warmup_s, seed,
    )  # fmt: skip


def drifting(
    models: Sequence[SimModel], rate: float, *, alpha: float = 0.9, cv: float = 4.0,
    period_s: float = 10.0, duration_s: float = 60.0, warmup_s: float = 10.0, seed: int = 0,
) -> Workload:  # fmt: skip
    """As `stationary`, with ranks drawn again every `period_s` seconds."""
    by_rank = power_law(len(models), alpha, rate)
    rng = _rng(seed, "ranks")
    periods = int(np.ceil(duration_s / period_s))
    table = np.stack([rng.permutation(by_rank) for _ in range(periods)])
    return _workload(
        f"drifting/{period_s:g}s a={alpha:g} cv={cv:g}", models,
        (pieces(table[:, each], period_s, duration_s) for each in range(len(models))),
        lambda _: cv, duration_s, warmup_s, seed,
    )  # fmt: skip


def stepping(
    models: Sequence[SimModel], rate: float, *, factor: float = 10.0, alpha: float = 0.9,
    cv: float = 1.0, at_s: float = 20.0, lasting_s: float = 20.0, duration_s: float = 60.0,
    warmup_s: float = 10.0, seed: int = 0,
) -> Workload:  # fmt: skip
    """As `stationary`, and the model of middle rank gets `factor` times its rate from `at_s` on
    for `lasting_s` seconds. `stepped(models, seed)` tells which that is."""
    by_rank = power_law(len(models), alpha, rate)
    order = _rng(seed, "ranks").permutation(len(models))
    rates: list[Rate] = [constant(float(by_rank[rank]), duration_s) for rank in order]
    hot = stepped(models, seed)
    usual = float(by_rank[order[hot]])
    at = np.array([0.0, at_s, at_s + lasting_s, duration_s])
    slope = usual * np.array([1.0, factor, 1.0])
    rates[hot] = Rate(at, np.concatenate(([0.0], np.cumsum(slope * np.diff(at)))))
    return _workload(
        f"step x{factor:g} a={alpha:g} cv={cv:g}", models, rates, lambda _: cv,
        duration_s, warmup_s, seed,
    )  # fmt: skip


def stepped(models: Sequence[SimModel], seed: int = 0) -> int:
    """Index of the model that `stepping` spikes: the one of middle rank."""
    order = _rng(seed, "ranks").permutation(len(models))
    return int(np.flatnonzero(order == len(models) // 2)[0])


def ramp(
    models: Sequence[SimModel], rate: float, *, lead_s: float = 30.0, every_s: float = 1.0,
    cv: float = 1.0, warmup_s: float = 10.0, tail_s: float = 10.0, seed: int = 0,
) -> Workload:  # fmt: skip
    """`rate` requests per second in all, evenly over the first k models; k is 1 for `lead_s`
    seconds and then grows by one every `every_s`. (Clockwork: 1000 per second, to 3600 models.)"""
    count = len(models)
    begins = np.concatenate(([0.0], lead_s + every_s * np.arange(count - 1)))
    duration_s = float(lead_s + every_s * max(count - 1, 0) + tail_s)
    at = np.append(begins, duration_s)
    until = np.concatenate(([0.0], np.cumsum(rate / np.arange(1, count + 1) * np.diff(at))))
    # All share one curve; each begins on it later.
    rates = (Rate(at[k:], until[k:] - until[k]) for k in range(count))
    return _workload("ramp", models, rates, lambda _: cv, duration_s, warmup_s, seed)


def oversubscribed(
    workers: Sequence[SimWorker], rate: float, *, times: int = 4, alpha: float = 0.9,
    cv: float = 4.0, duration_s: float = 60.0, warmup_s: float = 10.0, seed: int = 0,
) -> Workload:  # fmt: skip
    """`times` as many standard models as the workers' devices hold together."""
    slots = sum(worker.budget_bytes // WEIGHTS for worker in workers)
    made = stationary(
        fleet_of_models(slots * times, seed=seed), rate, alpha=alpha, cv=cv,
        duration_s=duration_s, warmup_s=warmup_s, seed=seed,
    )  # fmt: skip
    return msgspec.structs.replace(made, name=f"oversubscribed {times}x a={alpha:g} cv={cv:g}")


def azure_like(
    models: Sequence[SimModel], rate: float, *, minutes: int = 10, minute_s: float = 60.0,
    cv: float = 4.0, functions: int = 100, warmup_s: float = 10.0, seed: int = 0,
) -> Workload:  # fmt: skip
    """`functions` functions per model, striped over the models (function i asks model i mod N).
    A function's mean rate is 10^N(-1, 1.6) per minute, cut to [1e-4, 1e4]; 30 % are timers, 40 %
    Poisson, 30 % on for 1-5 minutes and off for a Pareto (1.3, 10 minutes). Counts per minute,
    brought to `rate` in all; within a minute Gamma gaps. `minute_s` seconds replay a minute."""
    rng = _rng(seed, "functions")
    total = functions * len(models)
    mean = np.clip(10 ** rng.normal(-1, 1.6, total), 1e-4, 1e4)
    kind = rng.random(total)
    counts = np.empty((total, minutes))
    timer, poisson = kind < 0.3, (kind >= 0.3) & (kind < 0.7)
    edges = np.arange(minutes + 1)
    phase = rng.random(int(timer.sum()))[:, None]
    counts[timer] = np.diff(np.floor(mean[timer, None] * edges + phase), axis=1)
    counts[poisson] = rng.poisson(mean[poisson, None], (int(poisson.sum()), minutes))
    for each in np.flatnonzero(kind >= 0.7):
        share = _on_share(minutes, rng)
        # While it is on it asks as much more as it is off the rest of the time.
        counts[each] = rng.poisson(mean[each] * share / _ON_SHARE)
    per_model = np.zeros((len(models), minutes))
    np.add.at(per_model, np.arange(total) % len(models), counts)
    per_model *= rate * minutes / max(per_model.sum(), 1.0)
    duration_s = minutes * minute_s
    return _workload(
        "azure-like", models,
        (pieces(row, minute_s, duration_s) for row in per_model),
        lambda _: cv, duration_s, warmup_s, seed,
    )  # fmt: skip


# --- parts --------------------------------------------------------------------------------

_ON_MINUTES = (1.0, 5.0)
_OFF_SHAPE, _OFF_LEAST = 1.3, 10.0
_ON_SHARE = 3.0 / (3.0 + _OFF_LEAST * _OFF_SHAPE / (_OFF_SHAPE - 1))
"""Of its life, on average, that an on/off function is on."""
_BEFORE_MINUTES = 600.0
"""On/off functions have been going on and off for so long."""


def _on_share(minutes: int, rng: np.random.Generator) -> Floats:
    """Of each minute, the share in which an on/off function is on."""
    end = _BEFORE_MINUTES + minutes
    cycles = int(end / (_ON_MINUTES[0] + _OFF_LEAST)) + 2
    on = rng.uniform(*_ON_MINUTES, cycles)
    off = _OFF_LEAST * (1 + rng.pareto(_OFF_SHAPE, cycles))
    at = np.concatenate(([0.0], np.cumsum(np.stack([off, on], axis=1).ravel())))
    on_until = np.concatenate(([0.0], np.cumsum(np.stack([0 * off, on], axis=1).ravel())))
    return np.diff(np.interp(_BEFORE_MINUTES + np.arange(minutes + 1), at, on_until))


def _rng(seed: int, what: str) -> np.random.Generator:
    """One stream of numbers per purpose: who is popular does not depend on how much is asked."""
    return np.random.default_rng([seed, *what.encode()])


def _workload(
    name: str, models: Sequence[SimModel], rates: Iterator[Rate] | Sequence[Rate],
    cv: Callable[[int], float], duration_s: float, warmup_s: float, seed: int,
) -> Workload:  # fmt: skip
    times, which = roll(rates, cv, _rng(seed, "arrivals"))
    return of_arrivals(name, models, times, which, duration_s, warmup_s=warmup_s, seed=seed)


def of_arrivals(
    name: str, models: Sequence[SimModel], times: Floats, which: Ints, duration_s: float,
    *, warmup_s: float = 0.0, seed: int = 0,
) -> Workload:  # fmt: skip
    """Any arrivals, ascending, as a workload."""
    return Workload(
        name=name, models=tuple(models), times=times, which=which,
        duration_s=duration_s, warmup_s=warmup_s, seed=seed,
    )  # fmt: skip
