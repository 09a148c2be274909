"""Workloads: the rates and the burstiness that were asked for, and no start in step."""

from __future__ import annotations

import time

import numpy as np
import pytest

from shared.models import Case, Profile
from sim import workloads
from sim.arrivals import constant, renewals, roll

MODELS = workloads.fleet_of_models(100)


def per_model(made):
    return np.bincount(made.which, minlength=len(made.models))


@pytest.mark.parametrize("cv", [1.0, 4.0, 8.0])
def test_no_start_in_step(cv):
    """Many bursty processes ask as much in their first second as in any other."""
    rates = [constant(2.0, 40.0)] * 3000
    times, _ = roll(rates, lambda _: cv, np.random.default_rng(5))
    by_second = np.bincount(times.astype(int), minlength=40)
    assert by_second[0] == pytest.approx(6000, rel=0.15)
    assert by_second[:5].mean() == pytest.approx(by_second[20:].mean(), rel=0.1)


def test_the_trap_is_real():
    """Bursty processes that begin with a whole gap at zero fire together: on those, the test
    above fails."""
    rng = np.random.default_rng(5)
    naive = np.cumsum(rng.gamma(1 / 16, 16 / 2.0, (3000, 2000)), axis=1)
    by_second = np.bincount(naive[naive < 40].astype(int), minlength=40)
    assert by_second[0] > 2 * by_second[20:].mean()


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 4.0])
def test_gaps_vary_as_asked(cv):
    """The gaps' mean is one, and their coefficient of variation the one asked for."""
    gaps = np.diff(renewals(100_000.0, cv, np.random.default_rng(1)))
    assert gaps.mean() == pytest.approx(1.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)


def test_nothing_expected_is_nothing():
    """A model that is never asked has no arrivals."""
    rng = np.random.default_rng(0)
    assert len(renewals(0.0, 4.0, rng)) == 0
    times, which = roll([], lambda _: 1.0, rng)
    assert len(times) == len(which) == 0


ALL = {
    "stationary": lambda seed: workloads.stationary(MODELS, 1000, seed=seed),
    "drifting": lambda seed: workloads.drifting(MODELS, 1000, seed=seed),
    "stepping": lambda seed: workloads.stepping(MODELS, 1000, seed=seed),
    "ramp": lambda seed: workloads.ramp(MODELS, 1000, seed=seed),
    "azure": lambda seed: workloads.azure_like(MODELS, 1000, minutes=3, seed=seed),
    "oversubscribed": lambda seed: workloads.oversubscribed(
        workloads.fleet_of_workers(4, 10), 1000, seed=seed
    ),
}


@pytest.mark.parametrize("recipe", ALL)
def test_every_recipe_keeps_its_laws(recipe):
    """Times ascend within the duration, the rate is what was asked for, a seed gives the same
    requests again, and another seed others."""
    made = ALL[recipe](3)
    assert (np.diff(made.times) >= 0).all()
    assert made.times[0] >= 0
    assert made.times[-1] < made.duration_s
    assert len(made.times) == len(made.which)
    assert len(made.times) / made.duration_s == pytest.approx(1000, rel=0.12)
    again, other = ALL[recipe](3), ALL[recipe](4)
    assert np.array_equal(made.times, again.times)
    assert np.array_equal(made.which, again.which)
    assert len(other.times) != len(made.times) or not np.array_equal(made.times, other.times)


def test_twice_the_rate_is_the_same_traffic_denser():
    """A search over rates on one seed compares the same popularity, and nearly the same bursts."""
    slow = workloads.stationary(MODELS, 500, cv=1.0, seed=7)
    fast = workloads.stationary(MODELS, 1000, cv=1.0, seed=7)
    assert per_model(fast) == pytest.approx(2 * per_model(slow), rel=0.5, abs=60)
    assert np.argmax(per_model(fast)) == np.argmax(per_model(slow))


def test_popularity_follows_the_power_law():
    """The most popular of 100 models has its share of the whole."""
    counts = np.sort(per_model(workloads.stationary(MODELS, 4000, alpha=1.2, cv=1.0)))[::-1]
    shares = workloads.power_law(100, 1.2, 1.0)
    assert counts[0] / counts.sum() == pytest.approx(shares[0], rel=0.05)
    assert counts[:10].sum() / counts.sum() == pytest.approx(shares[:10].sum(), rel=0.05)


def test_drift_changes_who_is_popular():
    """In each period another model leads, as a rule; over the whole run none does by far."""
    made = workloads.drifting(MODELS, 4000, alpha=1.2, cv=1.0, period_s=10, duration_s=60)
    leaders = set()
    for period in range(6):
        inside = (made.times >= period * 10) & (made.times < period * 10 + 10)
        leaders.add(int(np.bincount(made.which[inside]).argmax()))
    assert len(leaders) >= 5


def test_a_step_concerns_one_model():
    """The middle-ranked model asks for ten times more, and only while the step lasts."""
    made = workloads.stepping(MODELS, 4000, factor=10, at_s=20, lasting_s=20)
    hot = workloads.stepped(MODELS)
    ours = made.times[made.which == hot]
    before = ((ours >= 0) & (ours < 20)).sum()
    during = ((ours >= 20) & (ours < 40)).sum()
    after = (ours >= 40).sum()
    assert during / max(before, 1) == pytest.approx(10, rel=0.3)
    assert after == pytest.approx(before, rel=0.4)
    still = workloads.stationary(MODELS, 4000, cv=1.0)
    others = np.delete(per_model(made), hot)
    assert others == pytest.approx(np.delete(per_model(still), hot), rel=0.6, abs=80)


def test_the_ramp_adds_a_model_a_second():
    """The rate stays, and after k seconds k more models share it."""
    made = workloads.ramp(MODELS, 2000, lead_s=10)
    first = [float(made.times[made.which == model].min()) for model in (0, 10, 60)]
    assert first[0] < 0.1
    assert first[1:] == [pytest.approx(19, abs=1), pytest.approx(69, abs=1.5)]


def test_azure_like_popularity_is_very_uneven():
    """Striping hundred functions of eight decades per model leaves a few models with most."""
    made = workloads.azure_like(MODELS, 1000, minutes=5)
    counts = np.sort(per_model(made))[::-1]
    assert counts[:10].sum() > 0.4 * counts.sum()
    assert (counts > 0).sum() > 50


def test_oversubscription_counts_slots():
    """Four times what 4 workers of 10 models hold is 160 models."""
    workers = workloads.fleet_of_workers(4, 10)
    assert len(workloads.oversubscribed(workers, 100, times=4).models) == 160


def test_a_million_requests_are_made_in_linear_time():
    """Generation never is what a search waits for."""
    began = time.process_time()
    made = workloads.drifting(MODELS, 20_000, duration_s=60)
    assert len(made.times) > 1_000_000
    assert time.process_time() - began < 5


def test_measured_models_take_what_was_measured():
    """A profile's batches, weights and loads become the model's; without batches it is refused."""
    profile = Profile(
        device_kind="cpu", weights_bytes=5, load_seconds=2.0, cases=(Case(1, 0, 0.1),)
    )
    (model,) = workloads.measured_models(1, profile, target_ms=500)
    assert (model.weights_bytes, model.load_seconds, model.swap_seconds) == (5, 2.0, 2.0)
    assert model.manifest.target_ms == 500
    assert model.cases == (Case(1, 0, 0.1),)
    with pytest.raises(ValueError, match="no measured batches"):
        workloads.measured_models(1, Profile(device_kind="cpu", weights_bytes=5), target_ms=500)
