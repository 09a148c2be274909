"""A spike of one tenant, and what becomes of another's steady traffic: with shares of device time
and memory between the two, and as if all models were one tenant's.

`python -m sim.tenants` prints the table of docs/placement.md. Both runs get the same requests.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from sim.arrivals import Rate, roll
from sim.model import ENDINGS, Floats, Outcome, SimModel, Workload
from sim.placings import Roost
from sim.report import table
from sim.run import run
from sim.workloads import fleet_of_models, fleet_of_workers, of_arrivals

SPIKING, STEADY = "spiking", "steady"
TIMES: Final = 50
"""How much more the spike asks for."""
_ANSWERED: Final = ENDINGS.index("answered")


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """Models, workers and traffic of both."""

    workers: int = 4
    cap: int = 12
    """Models for which each device has room."""
    spiking: int = 20
    """Models of the tenant that spikes."""
    steady: int = 10
    rate: float = 300.0
    """Requests per second of the steady tenant: about a third of the fleet."""
    quiet: float = 150.0
    """Of the other one, before it spikes."""
    spike_at_s: float = 10.0
    spike_s: float = 20.0
    duration_s: float = 40.0
    warmup_s: float = 3.0


def workload(setting: Setting, seed: int = 0, *, tenants: bool) -> Workload:
    """`tenants`: models belong to the two; else all are nobody's."""
    own = [SPIKING] * setting.spiking + [STEADY] * setting.steady
    models = tuple(
        _of(model, tenant if tenants else "")
        for model, tenant in zip(fleet_of_models(len(own), seed=seed), own, strict=True)
    )
    at = np.array(
        [0.0, setting.spike_at_s, setting.spike_at_s + setting.spike_s, setting.duration_s]
    )
    spiking = setting.quiet / setting.spiking * np.array([1.0, TIMES, 1.0])
    steady = np.full(3, setting.rate / setting.steady)
    rates = [_rate(at, spiking if tenant == SPIKING else steady) for tenant in own]
    rng = np.random.default_rng([seed, *b"tenants"])
    times, which = roll(rates, lambda _: 1.0, rng)
    name = f"x{TIMES} of one tenant"
    return of_arrivals(
        name, models, times, which, setting.duration_s, warmup_s=setting.warmup_s, seed=seed
    )


def simulate(setting: Setting, seed: int = 0, *, tenants: bool) -> Outcome:
    fleet = fleet_of_workers(setting.workers, setting.cap)
    asked = workload(setting, seed, tenants=tenants)
    name = "shared by tenant" if tenants else "one for all"
    return run(asked, fleet, Roost(name=name), seed=seed)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one tenant got while the other spiked."""

    attainment: float
    """Of its requests, those that were answered in their target."""
    answered: float
    """In any time before their deadline."""
    p99_s: float
    """Of those; nan where there are none."""
    per_s: float
    """Answered in target, per second."""


def part(outcome: Outcome, setting: Setting, tenant: str) -> Part:
    """While the spike lasts."""
    asked = outcome.workload
    first = 0 if tenant == SPIKING else setting.spiking
    last = setting.spiking if tenant == SPIKING else setting.spiking + setting.steady
    end = setting.spike_at_s + setting.spike_s
    some = (asked.which >= first) & (asked.which < last)
    some &= (asked.times >= setting.spike_at_s) & (asked.times < end)
    targets = np.array([model.manifest.target_ms / 1e3 for model in asked.models])
    latency = outcome.latency[some]
    met = latency <= targets[asked.which[some]]
    answered = latency[outcome.ending[some] == _ANSWERED]
    return Part(
        attainment=float(met.mean()),
        answered=len(answered) / max(len(latency), 1),
        p99_s=float(np.quantile(answered, 0.99)) if len(answered) else float("nan"),
        per_s=float(met.sum()) / setting.spike_s,
    )


def _of(model: SimModel, tenant: str) -> SimModel:
    manifest = msgspec.structs.replace(model.manifest, tenant=tenant)
    return msgspec.structs.replace(model, manifest=manifest)


def _rate(at: Floats, slope: Floats) -> Rate:
    return Rate(at, np.concatenate(([0.0], np.cumsum(slope * np.diff(at)))))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sim.tenants", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    setting, rows = Setting(), []
    for tenants in (False, True):
        outcome = simulate(setting, args.seed, tenants=tenants)
        for tenant in (STEADY, SPIKING):
            got = part(outcome, setting, tenant)
            rows.append([
                outcome.policy, tenant, f"{got.attainment:.1%}", f"{got.answered:.1%}",
                f"{got.p99_s * 1e3:,.0f} ms", f"{got.per_s:,.0f}",
            ])  # fmt: skip
    head = ["device time and memory", "tenant", "in target", "answered", "p99", "in target/s"]
    print(table(head, rows))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
