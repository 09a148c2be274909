"""What moves between the tiers now, and which batches may run meanwhile: where swaps.py,
placing.py and dispatch.py meet."""

from __future__ import annotations

from math import inf

from services.worker.core.dispatch import Dispatch
from services.worker.core.events import Action, RunBatch
from services.worker.core.model import Model
from services.worker.core.placing import place
from services.worker.core.state import WorkerState
from services.worker.core.swaps import Missing, can_be_swapped_in, swap_in
from services.worker.core.victims import Activity


class Moves:
    def __init__(self, state: WorkerState, dispatch: Dispatch) -> None:
        self.refused = False
        """In the last move, something that items wait for lost its place."""
        self._state = state
        self._dispatch = dispatch

    @property
    def pending(self) -> bool:
        """More than swaps depends on batches that end."""
        state = self._state
        return state.quiesce or bool(state.leaving and (state.incomplete or state.overrun))

    def next_batches(self, now: float) -> list[Action]:
        actions = self._dispatch.next_batches(now)
        for action in actions:
            if isinstance(action, RunBatch):
                self._state.get(action.model).ran = True
        return actions

    def move(self, now: float, *, whole: bool, may_load: bool) -> list[Action]:
        """Unless it is the `whole`, only what is asked for moves."""
        state, missing = self._state, self._missing()
        self.refused = False
        if not (whole or missing or state.leaving):
            return []
        actions: list[Action] = []
        leaving, quiesce = state.leaving, state.quiesce
        state.leaving, state.quiesce = set(), False
        running = self._dispatch.under_way > 0
        # 1. What is asked for and not on the device is swapped in.
        if may_load:
            actions += swap_in(state, missing, now, self.activity, batches_running=running)
            self.refused = any(model.error is not None for _, model in missing)
        # 2. What is wanted comes, in what is left of the room and of the engine's time.
        if whole:
            actions += place(
                state,
                now,
                self.activity,
                batches_running=running,
                may_load=may_load,
                slots=max(state.max_loading // 2, 1) if missing else state.max_loading,
            )
        # 3. What need not leave, or be quiet, after all runs on.
        if leaving - state.leaving or (quiesce and not state.quiesce):
            actions += self.next_batches(now)
        return actions

    def activity(self, model: Model) -> Activity:
        if not model.unanswered:
            return Activity(inf, running=False)
        entries = self._dispatch.waiting(model.id)
        return Activity(entries[0].due if entries else inf, model.unanswered > len(entries))

    def _missing(self) -> Missing:
        """What items wait for and is not on the device, though it may come."""
        state = self._state
        if not state.swapping or not state.engine_up or state.condemned:
            return []
        models = [(name, state.get(name)) for name in self._dispatch.models_waiting()]
        return [
            (self._dispatch.waiting(name)[0].due, model)
            for name, model in models
            if can_be_swapped_in(state, model)
        ]
