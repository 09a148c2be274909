"""Which queues the broker is asked about."""

from __future__ import annotations

from services.placer.core.depths import DepthQuestions
from shared.names import ModelId


def models(prefix, count):
    return [ModelId(f"{prefix}{index}/1") for index in range(count)]


def test_all_are_asked_while_they_fit():
    """No question is put off for nothing."""
    questions = DepthQuestions(4)
    assert questions.choose(models("hot", 2), models("cold", 2)) == [
        *models("hot", 2),
        *models("cold", 2),
    ]


def test_never_more_than_the_limit_and_the_urgent_first():
    """With more than fit, the urgent have the first look."""
    questions = DepthQuestions(4)
    chosen = questions.choose(models("hot", 3), models("cold", 100))
    assert len(chosen) == 4
    assert set(models("hot", 3)) < set(chosen)


def test_all_that_wait_are_asked_in_turns():
    """Among equals the longest unasked is next: nobody is asked twice before all were."""
    questions = DepthQuestions(4)
    waiting = models("cold", 12)
    asked = [model for _ in range(3) for model in questions.choose([], waiting)]
    assert sorted(asked) == sorted(waiting)


def test_the_urgent_do_not_starve_the_rest():
    """Even where the urgent alone are more than fit, the rest is asked, only less often."""
    questions = DepthQuestions(4)
    hot, cold = models("hot", 8), models("cold", 8)
    asked = [model for _ in range(60) for model in questions.choose(hot, cold)]
    fewest = min(asked.count(model) for model in cold)
    assert fewest >= 2
    assert min(asked.count(model) for model in hot) > 2 * max(asked.count(m) for m in cold)


def test_newcomers_do_not_starve_the_old():
    """A stream of models that were never asked does not shut out one that waits since long."""
    questions = DepthQuestions(2)
    questions.choose([], models("old", 1))
    asked = []
    for look in range(30):
        asked += questions.choose(models(f"new{look}-", 8), models("old", 1))
    assert models("old", 1)[0] in asked


def test_what_does_not_wait_any_more_is_forgotten():
    """What is kept is that of what waits now, not of what ever waited."""
    questions = DepthQuestions(2)
    for look in range(100):
        questions.choose([], models(f"m{look}-", 5))
    assert "waiting=5" in repr(questions)
