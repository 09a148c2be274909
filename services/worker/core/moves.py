"""What moves between the tiers now, and which batches may run meanwhile: where swaps.py,
placing.py and dispatch.py meet."""

from __future__ import annotations

from math import inf
from typing import Final

from services.worker.core.dispatch import Dispatch
from services.worker.core.events import Action, RunBatch
from services.worker.core.model import Model
from services.worker.core.placing import place
from services.worker.core.state import WorkerState
from services.worker.core.swaps import Missing, can_be_swapped_in, swap_in
from services.worker.core.victims import Activity, Watch
from shared.names import ModelId

_MAY_WAIT: Final = 1e18
"""Due later than anything else."""


class Moves:
    def __init__(self, state: WorkerState, dispatch: Dispatch) -> None:
        self.refused = False
        """In the last move, something that items wait for lost its place."""
        self._state = state
        self._dispatch = dispatch
        self._stuck: tuple[float, ModelId] | None = None
        """What was the most urgent of the missing when nothing could move for it."""
        self._first: set[ModelId] = set()
        """Those of the missing whose tenants' turn has come."""

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
                self._stuck = None  # what was just handed over may leave after that
        return actions

    def happened(self) -> None:
        """Something other than that more items came, or were settled: it may be let in now."""
        self._stuck = None

    def move(self, now: float, *, whole: bool, may_load: bool) -> list[Action]:
        """Unless it is the `whole`, only what is asked for moves."""
        state, missing = self._state, self._missing()
        first = (missing[0][0], missing[0][1].id) if missing else None
        self.refused = False
        if not whole and (first == self._stuck if missing else not state.leaving):
            return []
        actions: list[Action] = []
        leaving, quiesce = state.leaving, state.quiesce
        state.chosen, state.leaving, state.quiesce = leaving, set(), False
        running = self._dispatch.under_way > 0
        # 1. What is asked for and not on the device is swapped in.
        if may_load:
            actions += swap_in(state, missing, now, self._watch_for, batches_running=running)
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
        self.refused = any(model.error is not None for _, model in missing)
        self._stuck = None if actions else first
        # 3. What need not leave, or be quiet, after all runs on.
        if leaving - state.leaving or (quiesce and not state.quiesce):
            actions += self.next_batches(now)
        return actions

    def activity(self, model: Model) -> Activity:
        if not model.unanswered:
            return Activity(inf, running=False)
        waiting, due = self._dispatch.backlog(model.id)
        return Activity(due, model.unanswered > waiting)

    def _missing(self) -> Missing:
        """What items wait for and is not on the device, though it may come."""
        state = self._state
        if not state.swapping or not state.engine_up or state.condemned:
            return []
        waiting = ((due, state.get(name)) for due, name in self._dispatch.urgency())
        missing = [(due, model) for due, model in waiting if can_be_swapped_in(state, model)]
        owed = self._first = self._owed(missing)
        if not owed:
            return missing
        return [each for each in missing if each[1].id in owed] + [
            each for each in missing if each[1].id not in owed
        ]

    def _owed(self, missing: Missing) -> set[ModelId]:
        """Of each tenant at most one: the most urgent, if others were given as much of the device
        while it was missing as bringing it in takes. Less would be lost in going to and fro."""
        owed: set[ModelId] = set()
        tenants: set[str] = set()
        for _, model in missing:
            if model.tenant not in tenants:
                tenants.add(model.tenant)
                owed_s = self._dispatch.owed_s(model.id)
                if owed_s > 0 and owed_s >= model.seconds_to_come:
                    owed.add(model.id)
        return owed

    def _watch_for(self, newcomer: Model) -> Watch:
        """What others have to do, as far as it counts against the newcomer: where its tenant's turn
        has come, it does not matter for how long what others ask for has been due."""
        if newcomer.id not in self._first:
            return self.activity

        def watch(model: Model) -> Activity:
            seen = self.activity(model)
            if seen.due == inf or model.tenant == newcomer.tenant:
                return seen
            return seen._replace(due=_MAY_WAIT)

        return watch
