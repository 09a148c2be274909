"""The thread for what takes long: programs parsed, files loaded whole, warm-ups. It is handed
work by the copier, and hands back what came of it; it decides nothing and owns nothing."""

from __future__ import annotations

import queue
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from services.worker.engine.dispatch import DeviceLost
from services.worker.engine.failures import Diagnosis, diagnose

T = TypeVar("T")


class Grapher:
    def __init__(self, resume: Callable[[Callable[[], None]], None]) -> None:
        """`resume` has a function run on the copier's thread."""
        self._resume = resume
        self._jobs: queue.SimpleQueue[Callable[[], Callable[[], None]] | None]
        self._jobs = queue.SimpleQueue()

    def submit(self, work: Callable[[], T], then: Callable[[T | Diagnosis], None]) -> None:
        """Runs `work` here after what is queued, and `then` with its result or with why it
        raised on the copier's thread."""
        self._jobs.put(lambda: partial(then, _result_of(work)))

    def finish(self) -> None:
        """`serve` returns after what is queued."""
        self._jobs.put(None)

    def serve(self) -> None:
        """Until `finish`. Raises `DeviceLost`."""
        while (job := self._jobs.get()) is not None:
            self._resume(job())
            del job  # it may hold a model that is evicted before the next one comes


def _result_of(work: Callable[[], T]) -> T | Diagnosis:
    try:
        return work()
    except DeviceLost:
        raise
    except Exception as error:  # noqa: BLE001 — files raise anything
        return diagnose(error)
