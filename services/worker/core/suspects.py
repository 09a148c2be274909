"""What may have ended an engine is tried alone: while that runs, or could run but for what else is
under way, nothing is loaded beside it."""

from __future__ import annotations

from services.worker.core.dispatch import Dispatch
from services.worker.core.state import WorkerState


class Suspects:
    def __init__(self, state: WorkerState, dispatch: Dispatch) -> None:
        self.among_us = False
        """An engine was lost, and what may have done it is still here."""
        self._state = state
        self._dispatch = dispatch

    def on_trial(self) -> bool:
        """One is running, or would but for what else is under way."""
        if not self.among_us:
            return False
        state, waiting = self._state, self._dispatch.suspects()
        isolating = self._dispatch.isolating()
        self.among_us = (
            isolating or bool(waiting) or any(state.get(m).suspect for m in state.wanted)
        )
        return isolating or any(state.is_ready(entry.item.model) for entry in waiting)
