import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.supervise import Backoff, TaskEnded, guard, stopping


async def test_a_task_that_returns_is_an_error() -> None:
    """A group of eternal tasks notices the one that simply returned."""

    async def returns() -> None:
        return

    async def service() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(guard(returns, "observer"))
            group.create_task(guard(asyncio.Event().wait, "sleeper"))

    with pytest.raises(ExceptionGroup) as caught:
        await service()
    (error,) = caught.value.exceptions
    assert isinstance(error, TaskEnded)
    assert "'observer'" in str(error)


async def test_a_failing_task_keeps_its_error_and_gets_its_name() -> None:
    """The error passes through, with a note that says which task it was."""

    async def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        await guard(fails, "observer")
    assert caught.value.__notes__ == ["in the task 'observer'"]


async def test_cancelling_a_guarded_task_is_no_error() -> None:
    """Cancellation passes through as cancellation."""
    task = asyncio.create_task(guard(asyncio.Event().wait, "sleeper"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@given(
    initial=st.floats(0.001, 10),
    cap=st.floats(0.001, 60),
    seed=st.integers(),
    tries=st.integers(1, 2000),
)
def test_backoff_stays_under_its_ceiling(initial: float, cap: float, seed: int, tries: int) -> None:
    """Every wait is within 0 and min(cap, initial · 2ⁿ), however long it goes on."""
    backoff = Backoff(initial, cap, random.Random(seed))
    for n in range(tries):
        assert 0 <= backoff.next() <= min(cap, initial * 2.0 ** min(n, 60))


def test_backoff_uses_its_whole_range_and_starts_anew_after_success() -> None:
    """The jitter is full, and a success makes the next wait short again."""
    backoff = Backoff(0.1, 5.0, random.Random(1))
    waits = [backoff.next() for _ in range(200)]
    assert max(waits) > 4.5
    assert min(waits[10:]) < 0.5
    backoff.reset()
    assert backoff.next() <= 0.1


async def test_first_signal_asks_second_ends() -> None:
    """The first signal sets the event; the second ends the process with 128 + its number."""
    died: list[int] = []
    ended = asyncio.Event()

    def die(status: int) -> None:
        died.append(status)
        ended.set()

    async with stopping([signal.SIGUSR1, signal.SIGUSR2], die=die) as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.wait_for(stop.wait(), 5)
        assert died == []
        os.kill(os.getpid(), signal.SIGUSR2)
        await asyncio.wait_for(ended.wait(), 5)
    assert died == [128 + signal.SIGUSR2]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


SERVICE = """
import asyncio, sys
from shared import logs
from shared.config import ConfigError
from shared.supervise import run_service

async def main(stop):
    how = sys.argv[1]
    if how == "fails":
        raise RuntimeError("no way")
    if how == "told wrongly":
        raise ConfigError("ROOST_X is wrong")
    if how == "returns":
        return
    if how == "let go":
        return stop.set()
    print(type(asyncio.get_running_loop()).__module__, flush=True)
    await stop.wait()
    print("asked", flush=True)
    if how == "hangs":
        await asyncio.Event().wait()

logs.configure("demo", "json")
run_service(main, "demo")
"""


def start(how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVICE, how],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_ends_in_order(number: signal.Signals) -> None:
    """On uvloop; a signal lets main finish, and the status is 0."""
    with start("waits") as service:
        assert service.stdout is not None
        assert service.stdout.readline() == "uvloop\n"
        service.send_signal(number)
        out, err = service.communicate(timeout=20)
    assert (service.returncode, out) == (0, "asked\n")
    assert '"event":"service_stopped"' in err


def test_a_second_signal_ends_a_service_that_hangs() -> None:
    """Who asks twice is obeyed at once."""
    with start("hangs") as service:
        assert service.stdout is not None
        service.stdout.readline()
        service.terminate()
        assert service.stdout.readline() == "asked\n"
        service.send_signal(signal.SIGINT)
        service.communicate(timeout=20)
    assert service.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("how", "event"), [("fails", "service_failed"), ("returns", "service_ended_by_itself")]
)
def test_a_service_that_ends_unasked_has_failed(how: str, event: str) -> None:
    """An error, or a return nobody asked for, is logged and gives status 1."""
    with start(how) as service:
        _, err = service.communicate(timeout=20)
    assert service.returncode == 1
    assert f'"event":"{event}"' in err
    assert "no way" in err or how != "fails"


def test_a_wrong_setting_that_shows_late_is_one_line() -> None:
    """For whoever sits at the terminal, as one that is seen at once; and the status is 2."""
    with start("told wrongly") as service:
        _, err = service.communicate(timeout=20)
    assert service.returncode == 2
    assert err.splitlines()[-1] == "ROOST_X is wrong"
    assert "Traceback" not in err


def test_a_service_that_was_let_go_ended_well() -> None:
    """Asked to end by another than a signal, it sets its event, and the status is 0."""
    with start("let go") as service:
        _, err = service.communicate(timeout=20)
    assert service.returncode == 0
    assert '"event":"service_stopped"' in err


def test_signals_are_not_needed_off_the_main_thread() -> None:
    """guard and Backoff run in any thread's loop (the embedded mode has one)."""
    seen: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(guard(lambda: asyncio.sleep(0), "short"))
        except TaskEnded as error:
            seen.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(seen) == 1
