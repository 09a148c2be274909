"""Who makes room: spare copies, then what nobody asks for, then copies that are not needed; last,
between tenants, what is asked of one that holds more than its share, for one that holds less.

Within each class the tenant that holds most, over its share, goes first; `priority` orders the
models of one tenant. What is asked goes only while its tenant holds, over its share, still no less
than the newcomer's does then: so nothing goes to and fro.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np

from services.placer.core.columns import Ints
from services.placer.core.fleet import Fleet
from services.placer.core.tenancy import whole_bytes
from services.placer.core.view import ModelView
from shared.fit import fit, fit_tiers
from shared.names import ModelId

Rank = tuple[int, float, int, float, float]
"""Class, what its tenant holds over its share (negative), the model's priority, regret, and when
it was last asked: the least goes first."""
_REGRET: Final = 3
"""Its place in a rank."""

_STRAY, _SPARE, _IDLE, _SURPLUS, _OVER_SHARE = range(5)
_LAST_COPY: Final = 1.0
"""Regret of what is asked and is then nowhere, beside what it is asked for."""
_WEIGHED_WORK: Final = 2
_TRIALS_PER_WORK: Final = 4
"""What judging all models of a worker costs, and seeing whether a newcomer fits without some,
against choosing a place."""
_NOBODY: Final = -1
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
        self._reclaimable: dict[int, Ints] = {}
        """By the tenant that reclaims; `_NOBODY`: none does."""

    def __repr__(self) -> str:
        return f"<Victims of {self.fleet!r}>"

    def again(self) -> None:
        """What was reckoned for all workers is reckoned anew: copies have come and gone."""
        self._reclaimable = {}

    @property
    def work(self) -> int:
        """What was done so far, in the unit of `Policy.work_per_tick`."""
        return _WEIGHED_WORK * self.weighed + self._trials // _TRIALS_PER_WORK

    def spent(self) -> bool:
        """Whether one planning has searched enough."""
        return self.work >= self.fleet.policy.work_per_tick

    def reclaimable(self, model: ModelId, *, reclaim: bool) -> Ints:
        """By worker, at most so many bytes could be had for the model."""
        tenant = self._reclaims(model, reclaim)
        found = self._reclaimable.get(tenant)
        if found is None:
            found = self._reclaimable[tenant] = self._bytes_of_victims(tenant)
        return found

    def make_room(
        self, worker: int, facts: ModelView, *, reclaim: bool
    ) -> tuple[tuple[ModelId, ...], float] | None:
        """The fewest victims, the least regretted first, with which the model fits, and the
        regret of them all. `reclaim`: also of what is asked, where others hold more than their
        share."""
        fleet = self.fleet
        seen = fleet.workers[worker]
        size = fleet.size_on(worker, facts.model)
        if fit(size, (), seen.budget_bytes) is not None:
            return None
        self.weighed += 1
        held = fleet.sizes(worker)
        who = facts.model if reclaim else None
        ranks = {m: rank for m in held if m != facts.model if (rank := self.rank(worker, m, who))}

        def fits(without: Collection[ModelId]) -> bool:
            self._trials += 1
            stay = [each for model, each in held.items() if model not in without]
            return fit_tiers(size, stay, seen.budget_bytes, seen.host_bytes) is None

        if not ranks or not fits(ranks):
            total = sum(held[model].weights_bytes for model in ranks)
            self._learn(worker, self._reclaims(facts.model, reclaim), total)
            return None
        taken: list[ModelId] = []
        for model in sorted(ranks, key=lambda model: (ranks[model], model)):
            taken.append(model)
            if fits(taken):
                break
        for model in list(taken):
            if len(taken) > 1 and fits([m for m in taken if m != model]):
                taken.remove(model)
        asked = [model for model in taken if ranks[model][0] == _OVER_SHARE]
        if asked and not self._is_fair(worker, taken, asked, facts.model):
            return None
        return tuple(taken), sum(ranks[model][_REGRET] for model in taken)

    def rank(self, worker: int, model: ModelId, newcomer: ModelId | None = None) -> Rank | None:
        """None when the model may not be taken from this worker (for the newcomer), else what goes
        first."""
        fleet, policy, at = self.fleet, self.fleet.policy, self.fleet.view.at
        columns, row = fleet.columns, fleet.columns.row.get(model)
        if row is None:
            return (_STRAY, 0.0, 0, 0.0, 0.0)
        binding = fleet.assigned(worker)[model]
        if binding.since >= at:
            return None
        copies, priority = fleet.lasting_copies(model), int(columns.priority[row])
        need, last_active = float(columns.need[row]), float(columns.last_active[row])
        low = max(int(columns.min_copies[row]), 1)
        unneeded = need <= policy.target_utilization * (copies - 1)
        level = 0.0
        if fleet.tenancy.several:
            level = -fleet.tenancy.level(int(columns.tenant[row]))
        if binding.spare and copies > low and unneeded:
            return (_SPARE, level, priority, need / copies, last_active)
        least_age = max(
            policy.victim_min_age_s, policy.victim_min_age_loads * float(columns.load_seconds[row])
        )
        serves = bool(fleet.serves[worker])
        if at - binding.since < least_age or (serves and copies <= int(columns.min_copies[row])):
            return None
        if not columns.asked[row]:
            if at - last_active >= policy.victim_idle_s:
                return (_IDLE, level, priority, self._regret(row, copies), last_active)
            return None
        # A copy more than its demand wants waits only for its hold-down to be over.
        if copies > 1 and unneeded:
            return (_SURPLUS, level, priority, 0.0, last_active)
        if newcomer is not None and self._is_over_share(worker, model, newcomer):
            regret = need / max(copies, 1) + (_LAST_COPY if copies <= 1 else 0.0)
            return (_OVER_SHARE, level, priority, regret, last_active)
        return None

    # --- parts ---

    def _reclaims(self, newcomer: ModelId, reclaim: bool) -> int:
        tenancy = self.fleet.tenancy
        return tenancy.of(newcomer) if reclaim and tenancy.several else _NOBODY

    def _is_over_share(self, worker: int, model: ModelId, newcomer: ModelId) -> bool:
        """Whether its tenant, without this copy, would hold no less over its share than that of the
        newcomer with it. Its last copy goes only for a first one."""
        fleet, tenancy = self.fleet, self.fleet.tenancy
        if not tenancy.several or tenancy.of(model) == tenancy.of(newcomer):
            return False
        if fleet.lasting_copies(model) <= 1 and fleet.copies(newcomer):
            return False
        return self._is_fair(worker, [model], [model], newcomer)

    def _is_fair(
        self,
        worker: int,
        victims: Collection[ModelId],
        asked: Collection[ModelId],
        newcomer: ModelId,
    ) -> bool:
        """The same of all victims together, for the tenants of those that are asked."""
        tenancy, held = self.fleet.tenancy, self.fleet.sizes(worker)
        losers = {tenancy.of(model) for model in asked}
        need = whole_bytes(self.fleet.size_on(worker, newcomer))
        after = tenancy.level(tenancy.of(newcomer), need)
        given: dict[int, int] = {}
        for model in victims:
            tenant = tenancy.of(model)
            given[tenant] = given.get(tenant, 0) + whole_bytes(held[model])
        return all(
            tenancy.level(tenant, -nbytes) >= after
            for tenant, nbytes in given.items()
            if tenant in losers
        )

    def _learn(self, worker: int, tenant: int, nbytes: int) -> None:
        """It was looked at, and has no more: so nobody looks again."""
        reclaimable = self._reclaimable.get(tenant)
        if reclaimable is not None:
            workspace = max(
                (s.workspace_bytes for s in self.fleet.sizes(worker).values()), default=0
            )
            most = nbytes + workspace if nbytes else 0
            reclaimable[worker] = min(int(reclaimable[worker]), most)

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

    def _bytes_of_victims(self, tenant: int) -> Ints:
        """`rank`, for a newcomer of the tenant that reclaims, of all bindings of the view at once.
        What was bound since is no victim; what was removed since counts still, and so does what a
        move keeps: at most, not exactly."""
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
        may_go = unneeded | idle
        if tenant != _NOBODY:
            levels = fleet.tenancy.held / fleet.tenancy.share
            may_go = may_go | (levels > levels[tenant])[columns.tenant]
        going = (since <= at - least_age[row]) & ~kept & may_go[row]
        # A spare copy, however new. Which are spare is not told here: as if all were.
        spare = np.repeat([bool(room.spare) for room in rooms], [len(r.rows) for r in rooms])
        going |= spare & (since < at) & (unneeded & (count > columns.min_copies))[row]
        total = np.bincount(worker, weights=nbytes * (going | stray), minlength=workers)
        # With the last that asks for it the room for its batches goes as well.
        workspace = [max((s.workspace_bytes for s in r.sizes.values()), default=0) for r in rooms]
        return total.astype(np.int64) + np.where(total > 0, workspace, 0)
