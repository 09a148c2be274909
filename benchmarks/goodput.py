"""N3: goodput under Roost's placement, over the best static ones on the same workers and memory.

Simulated (docs/simulator.md): the placer's and the workers' own decisions in virtual time. Each
rate is the greatest at which 99 % of the requests are answered in their target, found by bisection
on the same requests. `python -m sim.goodput` has more policies, settings and precision.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from benchmarks.outcome import Figure, Outcome, machine, now
from sim.goodput import Found, Setting, drifting, goodput, outcome
from sim.policies import REPLICATED

_TOLERANCE: Final = 0.04
_OTHERS: Final = ("periodic", "modelmesh", "ray-serve")


async def run(device: str, *, seed: int = 0, seconds: float = 60.0) -> Outcome:
    """Three fleets, ranks drawn again every 10 s. `seconds` of traffic in each run, of which the
    first 10 are not counted. Some minutes. The device is not used."""
    del device
    began = time.monotonic()
    common = {"seed": seed, "duration_s": seconds}
    roomy = drifting(4, 60, **common)  # type: ignore[arg-type]  # ints and floats, as named
    tight = drifting(4, 25, **common)  # type: ignore[arg-type]
    eight = drifting(8, 15, alpha=1.2, cv=2.0, **common)  # type: ignore[arg-type]
    figures: list[Figure] = []
    for setting, name, single, spread in (
        (eight, "8 workers x 15", 2.5, 1.3),
        (tight, "4 workers x 25", 1.6, 1.0),
        (roomy, "4 workers x 60", 1.6, 1.0),
    ):
        figures += await asyncio.to_thread(compare, setting, name, single, spread)
    # Both what N3 asks of, first.
    figures.sort(key=lambda figure: figure.reach is None)
    return Outcome(
        "goodput",
        "100 models whose ranks are drawn anew every 10 s, simulated: 4 + b ms a batch of b, "
        f"target 100 ms, loads 5-20 ms; seed {seed}, {seconds:g} s a run",
        machine("cpu: simulated", "not used"),
        tuple(figures),
        time.monotonic() - began,
        now(),
    )


def compare(setting: Setting, name: str, single: float, spread: float) -> list[Figure]:
    """The rows of one fleet: Roost, the best single-homed placement, the best replicated one."""
    static = goodput(setting, "static", tolerance=_TOLERANCE)
    near = static.rate or setting.capacity / 4
    # Copies cost: how many are best is tried where it matters, then searched with that.
    tried = {each: outcome(setting, each, 1.15 * near).attainment() for each in REPLICATED}
    best = max(tried, key=lambda each: tried[each])
    replicated = goodput(setting, best, start=1.15 * near, tolerance=_TOLERANCE)
    roost = goodput(setting, "roost", start=replicated.rate or near, tolerance=_TOLERANCE)
    at = roost.rate or near
    others = {each: outcome(setting, each, at).attainment() for each in _OTHERS}
    # Where replication helps nothing, the best static placement with it is the one without.
    with_copies = max(replicated.rate, static.rate)
    return [
        _ratio(f"{name}: Roost over static, single-homed", roost, static.rate, single),
        _ratio(f"{name}: Roost over static, replicated", roost, with_copies, spread),
        Figure(f"{name}: Roost", roost.rate, "req/s"),
        Figure(f"{name}: static, single-homed", static.rate, "req/s"),
        Figure(f"{name}: {best}", replicated.rate, "req/s"),
        *(
            Figure(f"{name}: in target at Roost's rate, {each}", 100 * share, "%")
            for each, share in others.items()
        ),
    ]


def _ratio(name: str, roost: Found, rate: float, reach: float) -> Figure:
    return Figure(name, roost.rate / rate if rate else 0.0, "x", reach, "at least")
