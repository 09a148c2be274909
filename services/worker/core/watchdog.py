"""What the engine does for too long, and its end for that: what it hangs in is found out by
whoever starts the next one. A batch and a load are watched, each the first of its kind: the others
may still wait for it."""

from __future__ import annotations

from math import inf

from services.worker.core.dispatch import Dispatch
from services.worker.core.events import Action, KillEngine
from services.worker.core.state import WorkerState


class Watchdog:
    def __init__(
        self,
        state: WorkerState,
        dispatch: Dispatch,
        *,
        batch_timeout_s: float,
        load_timeout_s: float,
    ) -> None:
        self._state = state
        self._dispatch = dispatch
        self._batch_timeout_s = batch_timeout_s
        self._load_timeout_s = load_timeout_s

    def __repr__(self) -> str:
        return f"Watchdog(batch {self._batch_timeout_s:g} s, load {self._load_timeout_s:g} s)"

    def due(self) -> float:
        """When what the engine does now has taken too long; infinite while it does nothing."""
        if self._state.condemned:
            return inf
        batch = self._dispatch.batch_due(self._batch_timeout_s)
        due, load = inf if batch is None else batch[0], self._state.oldest_load()
        return due if load is None else min(due, load.load_began + self._load_timeout_s)

    def watch(self, now: float) -> list[Action]:
        """Condemns the engine when that is now. It is asked at every decision: what is said then
        is made only then."""
        if self.due() > now:
            return []
        self._state.condemned = True
        batch = self._dispatch.batch_due(self._batch_timeout_s)
        if batch is not None and batch[0] <= now:
            return [KillEngine(f"a batch of {batch[1]} was running for {batch[2]:g} s")]
        load = self._state.oldest_load()
        assert load is not None
        return [KillEngine(f"{load.id} was loading for {self._load_timeout_s:g} s")]
