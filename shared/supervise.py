"""Running a service: its signals, its eternal tasks, and patience with what is away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Final, Never

import structlog

from shared.config import ConfigError

log = structlog.get_logger(__name__)

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class TaskEnded(RuntimeError):
    """A task that is to run as long as its service returned."""


async def guard(task: Callable[[], Awaitable[object]], name: str) -> Never:
    """Runs an eternal task. `asyncio.TaskGroup` takes a task that simply returns for a success
    and goes on without it; here that raises `TaskEnded`. Errors get the task's name as a note.
    """
    try:
        await task()
    except Exception as error:
        error.add_note(f"in the task {name!r}")
        raise
    raise TaskEnded(f"the task {name!r} ended, though it is to run for ever")


class Backoff:
    """How long to wait before the next try: exponential with *full* jitter, since a fleet that
    lost its broker at one moment must not come back at one moment."""

    def __init__(
        self, initial_s: float = 0.1, cap_s: float = 5.0, rng: random.Random | None = None
    ) -> None:
        self._initial_s = initial_s
        self._cap_s = cap_s
        self._rng = rng or random.Random()  # noqa: S311  (spreads load, guards no secret)
        self._tries = 0

    def next(self) -> float:
        """Seconds: anything up to `initial_s`, then up to twice that, … up to `cap_s`."""
        # The exponent is bounded: 2**1024 is no float, and an outage may last a weekend.
        ceiling_s = min(self._cap_s, self._initial_s * 2.0 ** min(self._tries, 60))
        self._tries += 1
        return self._rng.uniform(0.0, ceiling_s)

    def reset(self) -> None:
        """After a success."""
        self._tries = 0


@contextlib.asynccontextmanager
async def stopping(
    signals: Iterable[signal.Signals] = STOP_SIGNALS,
    *,
    die: Callable[[int], object] = os._exit,
) -> AsyncIterator[asyncio.Event]:
    """An event that the first of these signals sets. The second ends the process at once, with
    status 128 + signal: whoever asks twice does not want to wait for the orderly end."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("killed_while_stopping", signal=number.name)
            die(128 + number)
        else:
            log.info("stopping", signal=number.name)
            stop.set()

    installed = list(signals)
    for number in installed:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stop
    finally:
        for number in installed:
            loop.remove_signal_handler(number)


def run_service(main: Callable[[asyncio.Event], Awaitable[None]], name: str = "service") -> None:
    """Runs a service's `main` on uvloop until SIGTERM or SIGINT set its event and it returns.

    Returns after an orderly end. A `main` that somebody else than a signal asked to end sets the
    event itself, last. When `main` raises, or returns though nobody asked it to, that
    is logged and the process exits with status 1 (`SystemExit`), for a supervisor to restart; with
    status 2 and one line where `main` raises `ConfigError`.
    """

    async def run() -> bool:
        async with stopping() as stop:
            log.info("service_started", name=name)
            await main(stop)
            return stop.is_set()

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            asked = runner.run(run())
    except ConfigError as error:  # for whoever reads the terminal; a restart would not help
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
    except Exception:
        log.exception("service_failed", name=name)
        raise SystemExit(1) from None
    if not asked:
        log.error("service_ended_by_itself", name=name)
        raise SystemExit(1)
    log.info("service_stopped", name=name)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for every system; asyncio's own loop does the same, slower
        return None
    return uvloop.new_event_loop
