"""When a job's result is asked for again."""

from __future__ import annotations

import pytest

from roost.calls.waiting import Wait
from shared.errors import JobNotDone, ModelFailed, ModelNotFound, RoostError, Unavailable


def not_done(retry_after_s: float | None = None) -> JobNotDone:
    return JobNotDone("the job has not ended", retry_after_s=retry_after_s)


def test_the_gateway_says_when_to_look_again() -> None:
    """Each time; a second where it does not."""
    wait = Wait(None, now=100)
    assert wait.pause_s(not_done(5), now=100) == 5
    assert wait.pause_s(not_done(), now=1e9) == 1


def test_there_is_a_last_look_when_the_time_is_over() -> None:
    """Then what the gateway said is raised."""
    wait = Wait(3, now=100)
    assert wait.pause_s(not_done(2), now=100) == 2
    assert wait.pause_s(not_done(2), now=102) == 1
    last = not_done(2)
    with pytest.raises(JobNotDone) as caught:
        wait.pause_s(last, now=103)
    assert caught.value is last


def test_no_answer_is_waited_out_for_a_minute() -> None:
    """From when a gateway last knew of the job; never before one did."""
    away = Unavailable("no answer")
    with pytest.raises(Unavailable):
        Wait(None, now=0).pause_s(away, now=0)
    wait = Wait(None, now=0)
    wait.pause_s(not_done(), now=10)
    assert wait.pause_s(away, now=69) == 1
    wait.pause_s(not_done(), now=70)
    assert wait.pause_s(away, now=129) == 1
    with pytest.raises(Unavailable):
        wait.pause_s(away, now=130)


@pytest.mark.parametrize("error", [ModelFailed("x"), ModelNotFound("x"), RoostError("x")])
def test_every_other_answer_ends_the_wait(error) -> None:
    """It is the job's result, or there will be none."""
    wait = Wait(None, now=0)
    wait.pause_s(not_done(), now=0)
    with pytest.raises(type(error)):
        wait.pause_s(error, now=1)
