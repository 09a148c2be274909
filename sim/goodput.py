"""Goodput: the greatest rate at which 99 % of the requests are answered in their target.

`python -m sim.goodput` searches it for every policy and setting, on the same requests (one seed,
scaled), the same simulated workers and the same memory. It takes long; `python -m benchmarks
goodput` is the short version.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from shared.models import Profile
from sim import workloads
from sim.model import Outcome, SimModel, SimWorker, Workload
from sim.packing import batch_seconds
from sim.policies import POLICIES
from sim.report import table
from sim.run import run

TARGET: Final = 0.99


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One fleet, and traffic on it that is scaled."""

    name: str
    workers: tuple[SimWorker, ...]
    make: Callable[[float], Workload]
    """The workload at so many requests per second."""
    capacity: float
    """Requests per second of the fleet if every batch were full: no policy can do more."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a search. `rate` is the greatest that was seen to reach the target (0: none)."""

    setting: str
    policy: str
    rate: float
    attainment: float
    """At that rate."""
    tried: tuple[tuple[float, float], ...]
    """Rates and their attainments, in the order in which they were tried."""
    wall_s: float


def search(
    attained: Callable[[float], float],
    start: float,
    limit: float,
    *,
    tolerance: float = 0.02,
    target: float = TARGET,
) -> tuple[float, float, tuple[tuple[float, float], ...]]:
    """The greatest rate up to `limit` at which `attained` reaches `target`, to a share of
    `tolerance`: from near `start` in growing steps until the other side is reached, then by
    bisection. All searches with one `limit` and `tolerance` try rates of one grid, so two policies
    that do the same are found to do the same. Returns rate, attainment there, and all that was
    tried; rate 0 when even a hundredth of `limit` is too much."""
    lowest = math.ceil(math.log(100) / math.log1p(tolerance))
    shares: dict[int, float] = {}

    def rate(place: int) -> float:
        return limit * float((1 + tolerance) ** -place)

    def reaches(place: int) -> bool:
        shares[place] = attained(rate(place))
        return shares[place] >= target

    bad, good = -1, lowest + 1  # places on the grid: 0 is `limit`
    place = min(max(round(math.log(limit / start) / math.log1p(tolerance)), 0), lowest)
    step = max(round(math.log(1.15) / math.log1p(tolerance)), 1)
    while good - bad > 1:
        if reaches(place):
            good = place
        else:
            bad = place
        if good > lowest:
            place, step = min(bad + step, lowest), 2 * step
        elif bad < 0:
            place, step = max(good - step, 0), 2 * step
        else:
            place = (good + bad) // 2
    tried = tuple((rate(each), share) for each, share in shares.items())
    return (rate(good), shares[good], tried) if good <= lowest else (0.0, 0.0, tried)


def goodput(setting: Setting, policy: str, *, start: float = 0.0, tolerance: float = 0.02) -> Found:
    """`start`: a rate that is near, to save runs."""
    began = time.perf_counter()

    def attained(rate: float) -> float:
        return outcome(setting, policy, rate).attainment()

    rate, share, tried = search(
        attained, start or setting.capacity / 2, setting.capacity, tolerance=tolerance
    )
    return Found(
        setting=setting.name, policy=policy, rate=rate, attainment=share, tried=tried,
        wall_s=time.perf_counter() - began,
    )  # fmt: skip


def outcome(setting: Setting, policy: str, rate: float) -> Outcome:
    """One run, which ends once nothing that came can be in target any more."""
    workload = setting.make(rate)
    longest = max(model.manifest.target_ms for model in workload.models) / 1e3
    return run(
        workload,
        setting.workers,
        POLICIES[policy](workload),
        seed=workload.seed,
        until=workload.duration_s + longest,
    )


# --- settings -----------------------------------------------------------------------------


def drifting(
    workers: int, cap: int, *, models: Sequence[SimModel] | int = 100, host: bool = False,
    alpha: float = 0.9, cv: float = 4.0, period_s: float = 10.0, duration_s: float = 60.0,
    seed: int = 0,
) -> Setting:  # fmt: skip
    """Models whose popularity changes every `period_s`, on `workers` with room for `cap` of them
    each; `host`: and for all of them in the host's memory."""
    chosen = workloads.fleet_of_models(models, seed=seed) if isinstance(models, int) else models
    fleet = workloads.fleet_of_workers(
        workers, cap, weights_bytes=chosen[0].weights_bytes,
        host_models=len(chosen) if host else 0,
    )  # fmt: skip

    def make(rate: float) -> Workload:
        return workloads.drifting(
            chosen, rate, alpha=alpha, cv=cv, period_s=period_s, duration_s=duration_s, seed=seed
        )

    what = f"drift {period_s:g} s, a={alpha:g}, cv={cv:g}"
    tier = ", host tier" if host else ""
    return Setting(
        name=f"{workers} workers x {cap}{tier}, {len(chosen)} models, {what}",
        workers=fleet, make=make, capacity=_capacity(chosen[0], workers),
    )  # fmt: skip


def stationary(
    workers: int, cap: int, *, models: int = 100, alpha: float = 0.9, cv: float = 4.0,
    duration_s: float = 60.0, seed: int = 0,
) -> Setting:  # fmt: skip
    chosen = workloads.fleet_of_models(models, seed=seed)

    def make(rate: float) -> Workload:
        return workloads.stationary(
            chosen, rate, alpha=alpha, cv=cv, duration_s=duration_s, seed=seed
        )

    return Setting(
        name=f"{workers} workers x {cap}, {models} models, stationary, a={alpha:g}, cv={cv:g}",
        workers=workloads.fleet_of_workers(workers, cap),
        make=make, capacity=_capacity(chosen[0], workers),
    )  # fmt: skip


def oversubscribed(
    workers: int, cap: int, times: int, *, host: bool = True, duration_s: float = 60.0,
    seed: int = 0,
) -> Setting:  # fmt: skip
    """`times` as many models as the devices hold; with `host`, each host holds them all."""
    count = workers * cap * times
    fleet = workloads.fleet_of_workers(workers, cap, host_models=count if host else 0)

    def make(rate: float) -> Workload:
        return workloads.oversubscribed(fleet, rate, times=times, duration_s=duration_s, seed=seed)

    tier = ", host tier" if host else ""
    return Setting(
        name=f"{workers} workers x {cap}{tier}, {count} models ({times}x), stationary, a=0.9, cv=4",
        workers=fleet, make=make,
        capacity=_capacity(workloads.fleet_of_models(1)[0], workers),
    )  # fmt: skip


def _capacity(model: SimModel, workers: int) -> float:
    rows = max(model.manifest.max_batch_size, 1)
    return workers * rows / batch_seconds(model, rows)


def settings(seed: int = 0, duration_s: float = 60.0) -> dict[str, Setting]:
    """Those of docs/simulator.md, by a short name."""
    common = {"seed": seed, "duration_s": duration_s}
    made = {
        "roomy": drifting(4, 60, **common),  # type: ignore[arg-type]  # ints and floats, as named
        "tight": drifting(4, 25, **common),  # type: ignore[arg-type]
        "tight8": drifting(8, 15, alpha=1.2, cv=2.0, **common),  # type: ignore[arg-type]
        "tight-slow-drift": drifting(4, 25, period_s=60.0, seed=seed, duration_s=2 * duration_s),
        "tight-host": drifting(4, 25, host=True, **common),  # type: ignore[arg-type]
        "tight8-host": drifting(8, 15, alpha=1.2, cv=2.0, host=True, **common),  # type: ignore[arg-type]
        "roomy-still": stationary(4, 60, **common),  # type: ignore[arg-type]
        "tight-still": stationary(4, 25, **common),  # type: ignore[arg-type]
    }
    for times in (1, 2, 4):
        made[f"over{times}"] = oversubscribed(4, 50, times, **common)  # type: ignore[arg-type]
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sim.goodput", description=__doc__)
    names = list(settings())
    parser.add_argument("--setting", action="append", choices=names, help="default: all")
    parser.add_argument("--policy", action="append", choices=list(POLICIES), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic in each run")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of a rate, as a share")
    parser.add_argument(
        "--profile", type=Path, help="a measured profile (JSON) instead of the standard model: "
        "100 such models, 25 to a worker, drift of 10 s"
    )  # fmt: skip
    parser.add_argument("--target-ms", type=float, default=100.0, help="with --profile")
    parser.add_argument("--json", type=Path, help="writes all that was tried")
    args = parser.parse_args(argv)
    chosen = settings(args.seed, args.seconds)
    if args.profile is not None:
        profile = msgspec.json.decode(args.profile.read_bytes(), type=Profile)
        models = workloads.measured_models(100, profile, target_ms=args.target_ms)
        measured = drifting(4, 25, models=models, duration_s=args.seconds, seed=args.seed)
        chosen = {"measured": measured}
    found: list[Found] = []
    for short in args.setting or chosen:
        setting, start = chosen[short], 0.0
        for policy in args.policy or POLICIES:
            each = goodput(setting, policy, start=start, tolerance=args.tolerance)
            found.append(each)
            start = each.rate or start
            print(f"{setting.name}: {policy} {each.rate:,.0f}/s "
                  f"({len(each.tried)} runs, {each.wall_s:.0f} s)", file=sys.stderr)  # fmt: skip
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    print(told(found))
    print(json.dumps([[each.setting, each.policy, round(each.rate, 1)] for each in found]))
    return 0


def told(found: Sequence[Found]) -> str:
    """Settings by policies: rates, and how many times the best static one's."""
    policies = list(dict.fromkeys(each.policy for each in found))
    rates = {(each.setting, each.policy): each.rate for each in found}
    rows = []
    for setting in dict.fromkeys(each.setting for each in found):
        base = rates.get((setting, "static"), 0.0)
        cells = []
        for policy in policies:
            rate = rates.get((setting, policy))
            ratio = f" ({rate / base:.2f}x)" if rate is not None and base else ""
            cells.append("-" if rate is None else f"{rate:,.0f}{ratio}")
        rows.append([setting, *cells])
    return table(["requests/s at 99 % in target (over static)", *policies], rows)


if __name__ == "__main__":
    raise SystemExit(main())
