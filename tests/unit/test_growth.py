"""The rule by which a soak says that nothing grows."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.growth import slope

CYCLES = list(range(0, 6000, 50))


def samples(per_1000: float, noise: float, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    return [1000 + per_1000 * at / 1000 + rng.normal(0, noise) for at in CYCLES]


@pytest.mark.parametrize("seed", range(5))
def test_what_only_wavers_does_not_grow(seed):
    """Noise around a level is no growth, by a limit that a leak would pass."""
    found = slope(CYCLES, samples(0.0, 5.0, seed))
    assert found.low <= found.slope <= found.high
    assert not found.grows(10.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_is_found_in_noise(seed):
    """Twice the limit is never taken for nothing, and its size is told."""
    found = slope(CYCLES, samples(20.0, 5.0, seed))
    assert found.grows(10.0)
    assert found.slope == pytest.approx(20.0, rel=0.3)


def test_what_grows_while_it_warms_up_is_forgiven():
    """Caches and pools fill in the first third."""
    found = slope(CYCLES, [min(at, 2000) for at in CYCLES])
    assert (found.slope, found.high, found.first, found.last) == (0, 0, 2000, 2000)


def test_odd_samples_count_for_nothing():
    """One in ten is far off: the medians do not see it."""
    values = samples(0.0, 1.0)
    values[::10] = [1e6] * len(values[::10])
    assert not slope(CYCLES, values).grows(10.0)


def test_too_noisy_is_not_shown():
    """Where the interval reaches beyond the limit, the verdict is no."""
    assert slope(CYCLES, samples(0.0, 500.0)).grows(1.0)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="are needed"):
        slope(range(30), range(30))
