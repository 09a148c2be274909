"""New reports as columns: what of them is news, and what is only counted."""

from __future__ import annotations

import random

import msgspec
import pytest

from services.placer.core.demand import DemandTracker
from services.placer.core.policy import Policy
from shared.control import ModelReport, Report
from shared.models import Footprint
from shared.names import ModelId

A, B, C = ModelId("a/1"), ModelId("b/1"), ModelId("c/1")


def told(model, arrived=0, **more):
    more = {"tier": "device", "phase": "ready", "bound": True, "footprint": Footprint(1)} | more
    return ModelReport(model=model, arrived=arrived, **more)


def report(at, *models, worker="w1", incarnation="x"):
    return Report(
        worker=worker,
        incarnation=incarnation,
        seq=int(at * 1000),
        at=at,
        device_kind="cpu",
        device_name="",
        budget_bytes=1,
        used_bytes=0,
        measured_bytes=0,
        models=models,
    )


def rate(tracker, model):
    return float(tracker.rows.rate[tracker.rows.row[model]])


def test_what_only_counts_is_no_news():
    """Counters move in every report; nobody is to look at each model for them."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(0.0, told(A), told(B))], {}, 0.0)
    second = report(1.0, told(A, 5, held=2, busy_s=1.0), told(B, 1))
    news = tracker.observe([second], {}, 1.0)["w1"]
    assert (news.changed, news.gone, news.timed) == ((), (), False)
    assert news.models[A].held == 2


@pytest.mark.parametrize("times", [{"seconds_per_item": 0.01}, {"load_seconds": 2.0}])
def test_how_long_a_model_takes_is_told_of_its_worker(times):
    """A view of the worker shows it, so that one is to be made anew."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(0.0, told(A)), report(0.0, told(A), worker="w2")], {}, 0.0)
    news = tracker.observe(
        [report(1.0, told(A, **times)), report(1.0, told(A), worker="w2")], {}, 1.0
    )
    assert news["w1"].timed
    assert not news["w2"].timed


@pytest.mark.parametrize(
    "other",
    [
        {"bound": False},
        {"saturated": True},
        {"tier": "host"},
        {"phase": "failed"},
        {"footprint": Footprint(2)},
    ],
)
def test_anything_else_is_news_of_that_model_alone(other):
    """It comes with what was told before."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(0.0, told(A), told(B))], {}, 0.0)
    news = tracker.observe([report(1.0, told(A), told(B, 3, **other))], {}, 1.0)["w1"]
    assert list(news.changed) == [(told(B), told(B, 3, **other))]


def test_who_comes_and_who_goes_is_news():
    """And the others, told in another order, are the same as before."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(0.0, told(A), told(B))], {}, 0.0)
    news = tracker.observe([report(1.0, told(C), told(B, 4))], {}, 1.0)["w1"]
    assert list(news.changed) == [(None, told(C))]
    assert list(news.gone) == [told(A)]
    assert rate(tracker, B) == pytest.approx(4)


def test_counters_keep_to_their_models_in_another_order():
    """What each has counted before goes with its name, not with its place."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(0.0, told(A, 100), told(B, 7))], {}, 0.0)
    tracker.observe([report(1.0, told(B, 9), told(C), told(A, 101))], {}, 1.0)
    assert (rate(tracker, A), rate(tracker, B)) == (pytest.approx(1), pytest.approx(2))


def test_a_model_that_is_told_twice_counts_once():
    """By the last word."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(0.0, told(A, 1, held=5), told(A, 2, held=1))], {}, 0.0)
    assert tracker.demand(A, 0, 0.1, 0.0).held == 1
    tracker.observe([report(1.0, told(A, 1), told(A, 6, held=3))], {}, 1.0)
    assert tracker.demand(A, 0, 0.1, 1.0).held == 3
    assert rate(tracker, A) == pytest.approx(4)


def test_what_was_left_out_between_two_counts_is_counted_from_before():
    """Reports that are too close to count may leave a model out and bring it back."""
    tracker = DemandTracker(Policy())
    tracker.observe([report(0.0, told(A, 10), told(B))], {}, 0.0)
    tracker.observe([report(0.01, told(B))], {}, 0.01)
    tracker.observe([report(1.0, told(A, 14), told(B))], {}, 1.0)
    assert rate(tracker, A) == pytest.approx(4)


@pytest.mark.parametrize("seed", range(4))
def test_columns_say_what_the_newest_reports_say(seed):
    """Held is their sum, seconds are their mean, a rate is what came since: however workers and
    models come, go, start again, or are told of in another order."""
    chance, tracker, at = random.Random(seed), DemandTracker(Policy()), 100.0
    models = [ModelId(f"m{number}/1") for number in range(12)]
    counts: dict[str, dict[ModelId, int]] = {}
    starts = dict.fromkeys(("w1", "w2", "w3"), 0)
    for _ in range(60):
        at += 1.0
        said, came = list[Report](), dict.fromkeys(models, 0)
        for worker in starts:
            if chance.random() < 0.1:
                counts.pop(worker, None)  # it is gone
                continue
            had = counts.get(worker)
            again = chance.random() < 0.1
            if again:
                starts[worker] += 1
            each = list[ModelReport]()
            for model in chance.sample(models, chance.randint(0, 8)):
                before, held = (had or {}).get(model), chance.randint(0, 3)
                more, seconds = chance.randint(0, 9), chance.choice([0.0, 0.01, chance.random()])
                arrived = more if again or before is None else before + more
                each.append(told(model, arrived, held=held, seconds_per_item=seconds))
                if had is not None:
                    known = again or before is not None
                    came[model] += more if known else min(held, arrived)
            said.append(report(at, *each, worker=worker, incarnation=str(starts[worker])))
            counts[worker] = {one.model: one.arrived for one in each}
        tracker.observe(said, {}, at)
        for model in models:
            of = [each for one in said for each in one.models if each.model == model]
            demand = tracker.demand(model, 0, 0.1, at)
            assert demand.held == sum(each.held for each in of)
            measured = [each.seconds_per_item for each in of if each.seconds_per_item]
            if measured:
                assert demand.seconds_per_item == pytest.approx(sum(measured) / len(measured))
            if model in tracker.rows.row:
                assert rate(tracker, model) == pytest.approx(came[model], abs=1e-9)


def test_a_report_is_not_changed():
    """What was taken in stays as it was told: others hold it."""
    tracker, first = DemandTracker(Policy()), report(0.0, told(A, 1), told(B, 2))
    before = msgspec.json.encode(first)
    models = tracker.observe([first], {}, 0.0)["w1"].models
    tracker.forget(A)
    tracker.observe([report(1.0, told(B, 3))], {}, 1.0)
    assert set(models) == {A, B}
    assert msgspec.json.encode(first) == before
