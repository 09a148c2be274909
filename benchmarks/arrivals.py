"""When requests come: renewal processes with a heavy tail, over models of unequal popularity.

Every process is rolled before its first arrival counts. Started together at zero, all of them
would fire at once (a gap of a bursty process is most likely near zero), which no real traffic
does. (The simulator's generator, sim/arrivals.py, can do more, and draws other numbers; what was
published of `oversubscribe` rests on these.)
"""

from __future__ import annotations

import numpy as np

Arrival = tuple[float, int]
"""Seconds from the start, and which model."""


def zipf(models: int, alpha: float, rate: float, rng: np.random.Generator) -> list[float]:
    """Requests per second of each model, `rate` together, in random order."""
    weights = np.arange(1, models + 1, dtype=float) ** -alpha
    rates = rate * weights / weights.sum()
    rng.shuffle(rates)
    return [float(each) for each in rates]


def gamma(rates: list[float], cv: float, seconds: float, rng: np.random.Generator) -> list[Arrival]:
    """Gaps of coefficient of variation `cv`, by Gamma(1/cv², cv²/rate)."""
    arrivals: list[Arrival] = []
    shape = 1 / cv**2
    for model, rate in enumerate(rates):
        lead = 20 * (1 + cv**2) / (2 * rate)
        at = -lead
        while at < seconds:
            # Drawn in blocks: one by one numpy is slow.
            for gap in rng.gamma(shape, cv**2 / rate, 64):
                at += float(gap)
                if 0 <= at < seconds:
                    arrivals.append((at, model))
    arrivals.sort()
    return arrivals
