"""When requests come: renewal processes whose rates change over time.

A model's arrivals are drawn once in *operational* time, in which it is asked once per unit on
average, and then put through the inverse of its cumulative rate. So a rate may drift, step or
pause at any moment, the gaps keep their coefficient of variation, and the same seed at twice the
rate is the same traffic twice as dense, which a search over rates needs.

The trap: processes that all *begin* at zero fire together, for a gap of a bursty process is most
likely near zero (with a coefficient of 4, half of the first gaps are below a two-hundredth of the
mean). Here each begins in its stationary state, as if it had run for ever: the first gap is what
is left, at a random moment, of the gap that this moment falls into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from sim.model import Floats, Ints

_SPARE = 6.0
"""Standard deviations of the count that are drawn at once; more are drawn where they fall short."""


class Rate(msgspec.Struct, frozen=True):
    """Requests that were expected of one model until each of `at` (s, ascending); between them
    linear, so the rate is constant there."""

    at: Floats
    until: Floats


def constant(rate: float, duration_s: float) -> Rate:
    return Rate(np.array([0.0, duration_s]), np.array([0.0, rate * duration_s]))


def pieces(rates: Floats, piece_s: float, duration_s: float) -> Rate:
    """`rates[i]` (1/s) holds during the i-th `piece_s` seconds; the last one to the end."""
    at = np.minimum(np.arange(len(rates) + 1) * piece_s, duration_s)
    at[-1] = duration_s
    return Rate(at, np.concatenate(([0.0], np.cumsum(rates * np.diff(at)))))


def renewals(expected: float, cv: float, rng: np.random.Generator) -> Floats:
    """Arrivals of a stationary Gamma renewal process of rate 1 in [0, expected), ascending. Gaps
    have the coefficient of variation `cv`; 0: a clock with a random phase. O(expected)."""
    if expected <= 0:
        return np.empty(0)
    if cv == 0:
        return np.arange(rng.random(), expected, 1.0)
    shape, scale = 1 / cv**2, cv**2
    # What is left of a gap at a random moment: gaps are met in proportion to their length, and
    # a Gamma gap weighted by its length is a Gamma of one more.
    at = float(rng.gamma(shape + 1, scale) * rng.random())
    parts = []
    while at < expected:
        left = expected - at
        count = int(left + _SPARE * cv * np.sqrt(left) + 8)
        part = at + np.concatenate(([0.0], np.cumsum(rng.gamma(shape, scale, count))))
        parts.append(part[:-1])
        at = float(part[-1])
    if not parts:
        return np.empty(0)
    drawn = np.concatenate(parts)
    return drawn[: np.searchsorted(drawn, expected)]


def roll(
    rates: Iterable[Rate], cv: Callable[[int], float], rng: np.random.Generator
) -> tuple[Floats, Ints]:
    """All models' arrivals, merged: times, and which model. `cv` tells each model's."""
    times: list[Floats] = []
    which: list[Ints] = []
    for number, rate in enumerate(rates):
        drawn = renewals(float(rate.until[-1]), cv(number), rng)
        if len(drawn):
            times.append(np.interp(drawn, rate.until, rate.at))
            which.append(np.full(len(drawn), number, dtype=np.int32))
    return merged(times, which)


def merged(times: list[Floats], which: list[Ints]) -> tuple[Floats, Ints]:
    """Ascending by time; at one moment, by model."""
    if not times:
        return np.empty(0), np.empty(0, dtype=np.int32)
    everything = np.concatenate(times)
    order = np.argsort(everything, kind="stable")
    return everything[order], np.concatenate(which)[order]
