"""Who makes room: spare copies, then what nobody asks for, then copies that are not needed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np

from services.placer.core.columns import Ints
from services.placer.core.fleet import Fleet
from services.placer.core.view import ModelView
from shared.fit import fit, fit_tiers
from shared.names import ModelId

Rank = tuple[int, int, float, float]
"""Class, the model's priority, regret, and when it was last asked: the least goes first."""

_STRAY, _SPARE, _IDLE, _SURPLUS = range(4)
_WEIGHED_WORK: Final = 2
_TRIALS_PER_WORK: Final = 4
"""What judging all models of a worker costs, and seeing whether a newcomer fits without some,
against choosing a place."""
_NO_TRAFFIC: Final = 2.0
"""Requests within the slow average's memory from which on they are traffic that will go on. Below,
nothing is known but which was asked last."""


class Victims:
    """Finds them on one fleet, whose changes it sees."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.weighed = 0
        """Workers whose models were judged one by one."""
        self._trials = 0
        self._reclaimable: Ints | None = None

    def __repr__(self) -> str:
        return f"<Victims of {self.fleet!r}>"

    def again(self) -> None:
        """What was reckoned for all workers is reckoned anew: copies have come and gone."""
        self._reclaimable = None

    @property
    def work(self) -> int:
        """What was done so far, in the unit of `Policy.work_per_tick`."""
        return _WEIGHED_WORK * self.weighed + self._trials // _TRIALS_PER_WORK

    def spent(self) -> bool:
        """Whether one planning has searched enough."""
        return self.work >= self.fleet.policy.work_per_tick

    def reclaimable(self) -> Ints:
        """By worker, at most so many bytes could be had."""
        if self._reclaimable is None:
            self._reclaimable = self._bytes_of_victims()
        return self._reclaimable

    def make_room(self, worker: int, facts: ModelView) -> tuple[tuple[ModelId, ...], float] | None:
        """The fewest victims, the least regretted first, with which the model fits, and the
        regret of them all."""
        fleet = self.fleet
        seen = fleet.workers[worker]
        size = fleet.size_on(worker, facts.model)
        if fit(size, (), seen.budget_bytes) is not None:
            return None
        self.weighed += 1
        held = fleet.sizes(worker)
        ranks = {m: rank for m in held if m != facts.model if (rank := self.rank(worker, m))}

        def fits(without: Collection[ModelId]) -> bool:
            self._trials += 1
            stay = [each for model, each in held.items() if model not in without]
            return fit_tiers(size, stay, seen.budget_bytes, seen.host_bytes) is None

        if not ranks or not fits(ranks):
            self._learn(worker, sum(held[model].weights_bytes for model in ranks))
            return None
        taken: list[ModelId] = []
        for model in sorted(ranks, key=lambda model: (ranks[model], model)):
            taken.append(model)
            if fits(taken):
                break
        for model in list(taken):
            if len(taken) > 1 and fits([m for m in taken if m != model]):
                taken.remove(model)
        return tuple(taken), sum(ranks[model][2] for model in taken)

    def rank(self, worker: int, model: ModelId) -> Rank | None:
        """None when the model may not be taken from this worker, else what goes first."""
        fleet, policy, at = self.fleet, self.fleet.policy, self.fleet.view.at
        columns, row = fleet.columns, fleet.columns.row.get(model)
        if row is None:
            return (_STRAY, 0, 0.0, 0.0)
        binding = fleet.assigned(worker)[model]
        if binding.since >= at:
            return None
        copies, priority = fleet.lasting_copies(model), int(columns.priority[row])
        need, last_active = float(columns.need[row]), float(columns.last_active[row])
        low = max(int(columns.min_copies[row]), 1)
        unneeded = need <= policy.target_utilization * (copies - 1)
        if binding.spare and copies > low and unneeded:
            return (_SPARE, priority, need / copies, last_active)
        least_age = max(
            policy.victim_min_age_s, policy.victim_min_age_loads * float(columns.load_seconds[row])
        )
        serves = bool(fleet.serves[worker])
        if at - binding.since < least_age or (serves and copies <= int(columns.min_copies[row])):
            return None
        if not columns.asked[row]:
            if at - last_active >= policy.victim_idle_s:
                return (_IDLE, priority, self._regret(row, copies), last_active)
            return None
        # A copy more than its demand wants waits only for its hold-down to be over.
        if copies > 1 and unneeded:
            return (_SURPLUS, priority, 0.0, last_active)
        return None

    # --- parts ---

    def _learn(self, worker: int, nbytes: int) -> None:
        """It was looked at, and has no more: so nobody looks again."""
        if self._reclaimable is not None:
            workspace = max(
                (s.workspace_bytes for s in self.fleet.sizes(worker).values()), default=0
            )
            most = nbytes + workspace if nbytes else 0
            self._reclaimable[worker] = min(int(self._reclaimable[worker]), most)

    def _regret(self, row: int, copies: int) -> float:
        """Seconds of loading per second that giving it up will cost: how often it is asked, as a
        rule, times what bringing it back takes. Nothing while others have it, or where a few
        requests are all there was."""
        if copies > 1:
            return 0.0
        columns, policy = self.fleet.columns, self.fleet.policy
        rate = float(columns.rate_slow[row])
        if rate * policy.slow_tau_s < _NO_TRAFFIC:
            return 0.0
        return rate * (float(columns.load_seconds[row]) or policy.unknown_load_s)

    def _bytes_of_victims(self) -> Ints:
        """`rank` of all bindings of the view at once. What was bound since is no victim; what
        was removed since counts still, and so does what a move keeps: at most, not exactly."""
        fleet, policy, at = self.fleet, self.fleet.policy, self.fleet.view.at
        columns, rooms = fleet.columns, fleet.rooms
        workers = len(rooms)
        if not len(fleet.binding_row):
            return np.zeros(workers, np.int64)
        since = np.concatenate([room.since for room in rooms])
        nbytes = np.concatenate([room.bytes for room in rooms])
        row, worker = fleet.binding_row, fleet.binding_worker
        stray = row < 0
        count = fleet.count
        unneeded = (count > 1) & (columns.need <= policy.target_utilization * (count - 1))
        idle = ~columns.asked & (at - columns.last_active >= policy.victim_idle_s)
        least_age = np.maximum(
            policy.victim_min_age_s, policy.victim_min_age_loads * columns.load_seconds
        )
        kept = fleet.serves[worker] & (count <= columns.min_copies)[row]
        going = (since <= at - least_age[row]) & ~kept & (unneeded | idle)[row]
        # A spare copy, however new. Which are spare is not told here: as if all were.
        spare = np.repeat([bool(room.spare) for room in rooms], [len(r.rows) for r in rooms])
        going |= spare & (since < at) & (unneeded & (count > columns.min_copies))[row]
        total = np.bincount(worker, weights=nbytes * (going | stray), minlength=workers)
        # With the last that asks for it the room for its batches goes as well.
        workspace = [max((s.workspace_bytes for s in r.sizes.values()), default=0) for r in rooms]
        return total.astype(np.int64) + np.where(total > 0, workspace, 0)
