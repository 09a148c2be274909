"""The picture of the fleet that a planning works on: a view, and the changes made so far.

Workers and models are rows of arrays (ADR 0011); what is looked at one by one (sizes, bindings)
comes from the view until it is changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from services.placer.core.columns import Bools, Floats, Ints, columns_of, facts_of
from services.placer.core.policy import Policy
from services.placer.core.rooms import rooms
from services.placer.core.tenancy import Tenancy, fairly, whole_bytes
from services.placer.core.view import Binding, ModelView, Move, View, expected, footprint
from shared.fit import can_be_served, used_bytes
from shared.models import Footprint
from shared.names import ModelId

_FEW = 8
"""So many workers are sooner looked at one by one than as a column."""


class Fleet:
    """Assignments as they would be after the changes made so far.

    Laws: `count[row]` is the number of serving workers to which a model is assigned, without
    stalled ones where it cannot wait for them (`_hurries`), `holding` of all; only assigned models
    count against a budget, since a worker drops unbound weights by itself. Copies that `counts` are
    what their tenant holds (`tenancy`); `columns.need` is what it is to have (`tenancy.fairly`).
    Worker rows are in the order of their names.
    """

    def __init__(self, view: View, policy: Policy) -> None:
        self.view = view
        self.policy = policy
        columns = columns_of(view.models)
        self.tenancy = Tenancy(columns, view.quotas)
        self.names = sorted(view.workers)
        self.number = {name: number for number, name in enumerate(self.names)}
        self.workers = [view.workers[name] for name in self.names]
        seen = self.workers
        self.rooms = rooms(seen, view.models, columns.row)
        self.takes: Bools = np.array([each.takes_new for each in seen], bool)
        self.serves: Bools = np.array([each.serves for each in seen], bool)
        self.stalled: Bools = np.array([each.stalled for each in seen], bool)
        self.budget: Ints = np.array([each.budget_bytes for each in seen], np.int64)
        self.host: Ints = np.array([each.host_bytes for each in seen], np.int64)
        self.used: Ints = np.array([room.used for room in self.rooms], np.int64)
        self.copied: Floats = np.array([each.copied_s for each in seen], float)
        self.slowness: Floats = np.array([each.slowness for each in seen], float)
        self.serving = int(self.serves.sum())
        capacity = policy.target_utilization * self.serving
        self.columns = fairly(columns, self.tenancy, self.serving, capacity)
        self._count_bindings()
        self.follow_moves(view.pace.moves)
        self._per_byte: float | None = None
        self._sizes: dict[int, dict[ModelId, Footprint]] = {}
        self._assigned: dict[int, dict[ModelId, Binding]] = {}
        self._held_by: dict[ModelId, list[int]] = {}
        self._left: dict[ModelId, set[int]] = {}

    def __repr__(self) -> str:
        return f"Fleet({ {name: sorted(self.assigned(n)) for name, n in self.number.items()} })"

    # --- what is where ----------------------------------------------------------------------

    def assigned(self, worker: int) -> Mapping[ModelId, Binding]:
        changed = self._assigned.get(worker)
        return self.workers[worker].assigned if changed is None else changed

    def sizes(self, worker: int) -> Mapping[ModelId, Footprint]:
        """Footprint of each model assigned to the worker."""
        changed = self._sizes.get(worker)
        return self.rooms[worker].sizes if changed is None else changed

    def holders(self, model: ModelId) -> list[int]:
        """Workers to which the model is assigned, serving or not."""
        return list(self._holders(model))

    def left(self, model: ModelId) -> Collection[int]:
        """Workers from which the model was removed, whether it came back or not."""
        return self._left.get(model, ())

    def copies(self, model: ModelId) -> int:
        """Serving workers to which the model is assigned."""
        row = self.columns.row.get(model)
        return 0 if row is None else int(self.count[row])

    def lasting_copies(self, model: ModelId) -> int:
        """`copies`, where both ends of a move under way are one: else its target, which serves
        nobody yet, would make its source look like one too many."""
        copies, move = self.copies(model), self._moves.get(model)
        if move is None:
            return copies
        ends = {self.number.get(move.source), self.number.get(move.target)}
        held = sum(worker in ends for worker in self._holders(model) if self.serves[worker])
        return copies - 1 if held > 1 else copies

    def counts(self, model: ModelId, worker: int) -> bool:
        """Whether a copy there is one of `count`."""
        if not self.serves[worker]:
            return False
        row = self.columns.row.get(model)
        return not self.stalled[worker] or row is None or not self.hurries[row]

    def on_their_way(self, model: ModelId) -> int:
        """Copies assigned to serving workers that do not consume the queue yet."""
        return sum(
            self.counts(model, worker) and not self.consumes(model, worker)
            for worker in self._holders(model)
        )

    def consumes(self, model: ModelId, worker: int) -> bool:
        """Whether a worker to which the model is assigned consumes its queue. What was assigned
        just now does not: a report that says so tells of a binding that it had before."""
        since = self.assigned(worker)[model].since
        return self.workers[worker].is_bound(model) and since < self.view.at

    def free(self) -> Ints:
        """Bytes of each device that nothing assigned asks for; below 0 where some are swapped."""
        return self.budget - self.used

    def overfull(self) -> list[int]:
        """Workers that cannot serve what they are assigned. None without a budget: its engine
        has not said yet what the device has."""
        return [
            worker
            for worker in np.flatnonzero((self.used > self.budget) & (self.budget > 0)).tolist()
            if not self._is_served(worker)
        ]

    def is_overfull(self, worker: int) -> bool:
        """Whether it is one of `overfull`."""
        over = 0 < self.budget[worker] < self.used[worker]
        return bool(over) and not self._is_served(worker)

    def used_bytes(self, *, on_device: bool = False) -> int:
        """What all that is assigned to serving workers takes there, or what of it cannot wait in
        a host's memory. What several have counts once per worker: so it would elsewhere. Spare
        copies count for nothing."""
        total = 0
        for worker in np.flatnonzero(self.serves).tolist():
            room = self.rooms[worker]
            if worker not in self._sizes:
                total += room.device_used if on_device else max(room.used - room.spare_bytes, 0)
                continue
            assigned, sizes = self.assigned(worker), self.sizes(worker)
            spare = [model for model, each in assigned.items() if each.spare]
            if on_device:
                sizes = {m: s for m, s in sizes.items() if s.pinned or not s.copyable}
            elif not spare:
                total += int(self.used[worker])
                continue
            total += used_bytes(size for model, size in sizes.items() if model not in spare)
        return total

    def share(self, model: ModelId) -> float:
        """What each copy of the model is asked for, on a worker of the mean speed."""
        row = self.columns.row.get(model)
        if row is None:
            return 0.0
        return float(self.columns.need[row]) / max(int(self.count[row]), 1)

    def spread(self, asked: Floats) -> Floats:
        """By worker, if each model were asked for so much (by row), shared by its copies."""
        share = np.where(self.count > 0, asked / np.maximum(self.count, 1), 0.0)
        known = self.binding_row >= 0
        # As the view says, but for those models whose holders were looked at, and so may be others.
        looked = [row for m in self._held_by if (row := self.columns.row.get(m)) is not None]
        still = share.copy()
        still[looked] = 0.0
        spread: Floats = np.zeros(len(self.rooms))
        np.add.at(spread, self.binding_worker[known], still[self.binding_row[known]])
        for row in looked:
            model = self.columns.ids[row]
            if share[row] and model is not None:
                spread[self._held_by[model]] += share[row]
        return spread * self.slowness

    def load_seconds(self, facts: ModelView) -> float:
        """What loading the model takes: measured, else by the byte as others here took."""
        if facts.load_seconds:
            return facts.load_seconds
        if self._per_byte is None:
            self._per_byte = self._measured_per_byte()
        if not self._per_byte or not self.workers:
            return self.policy.unknown_load_s
        return self._per_byte * expected(self.workers[0].device_kind, facts).weights_bytes

    def size_on(self, worker: int, model: ModelId) -> Footprint:
        return footprint(self.workers[worker], model, facts_of(self.view.models, model))

    # --- changes ----------------------------------------------------------------------------

    def add(self, model: ModelId, worker: int, binding: Binding, load_s: float = 0.0) -> None:
        self._touch(worker)
        self._asked_for(model, -1)
        self._assigned[worker][model] = binding
        self._sizes[worker][model] = self.size_on(worker, model)
        self._holders(model).append(worker)
        self._counted(model, worker, 1, self._sizes[worker][model])
        self._asked_for(model, 1)
        self.copied[worker] += load_s
        self.used[worker] = used_bytes(self._sizes[worker].values())

    def remove(self, model: ModelId, worker: int) -> None:
        self._touch(worker)
        self._left.setdefault(model, set()).add(worker)
        self._asked_for(model, -1)
        del self._assigned[worker][model]
        size = self._sizes[worker].pop(model)
        self._holders(model).remove(worker)
        self._counted(model, worker, -1, size)
        self._asked_for(model, 1)
        self.used[worker] = used_bytes(self._sizes[worker].values())

    def follow_moves(self, moves: Iterable[Move]) -> None:
        """These are under way from now on, or done."""
        self._moves = {move.model: move for move in moves if move.done is None}

    # --- parts ------------------------------------------------------------------------------

    def _asked_for(self, model: ModelId, sign: int) -> None:
        """All that have the model share what it is asked for: one more relieves the others."""
        share = sign * self.share(model)
        if not share:
            return
        holders = self._holders(model)
        if len(holders) > _FEW:
            self.busy[holders] += share * self.slowness[holders]
            return
        for worker in holders:
            self.busy[worker] += share * self.slowness[worker]

    def _measured_per_byte(self) -> float:
        """Seconds of loading per byte of what is bound; 0 when nothing was measured."""
        known = self.binding_row >= 0
        seconds = self.columns.load_seconds[self.binding_row[known]]
        nbytes = _joined([room.bytes for room in self.rooms])[known]
        measured = (seconds > 0) & (nbytes > 0)
        total = int(nbytes[measured].sum())
        return float(seconds[measured].sum()) / total if total else 0.0

    def _count_bindings(self) -> None:
        """All bindings as three columns: of which model, on which worker, since when."""
        lengths = [len(room.rows) for room in self.rooms]
        self.binding_worker: Ints = np.repeat(np.arange(len(self.rooms)), lengths)
        self.binding_row: Ints = _joined([room.rows for room in self.rooms])
        rows, known = len(self.columns.ids), self.binding_row >= 0
        self.holding: Ints = np.bincount(self.binding_row[known], minlength=rows)
        self.hurries = self._hurries() if self.stalled.any() else np.zeros(rows, bool)
        serving = known & self.serves[self.binding_worker]
        serving &= ~(self.stalled[self.binding_worker] & self.hurries[self.binding_row])
        self.count: Ints = np.bincount(self.binding_row[serving], minlength=rows)
        if self.tenancy.counts:
            whole = _joined([room.whole for room in self.rooms])[serving]
            tenants = self.columns.tenant[self.binding_row[serving]]
            np.add.at(self.tenancy.held, tenants, whole)
        share = self.columns.need / np.maximum(self.count, 1)
        asked = np.bincount(
            self.binding_worker[known],
            weights=share[self.binding_row[known]],
            minlength=len(self.rooms),
        )
        self.busy: Floats = asked * self.slowness
        self._order: Ints | None = None
        self._starts: Ints | None = None

    def _hurries(self) -> Bools:
        """Models that are asked, or will be before a stalled worker is back, and are elsewhere
        sooner; and that may be at two places, should it come back. What is on two stalled workers
        may be what stalled them: it is taken to no third."""
        columns, back_s = self.columns, self.policy.engine_grace_s
        stalled = (self.binding_row >= 0) & self.stalled[self.binding_worker]
        harmless = np.bincount(self.binding_row[stalled], minlength=len(columns.ids)) < 2
        wanted = columns.asked | (columns.rate_fast * back_s >= 1.0)
        sooner = columns.load_seconds < back_s
        return wanted & sooner & harmless & (columns.limit > self.holding)

    def _holders(self, model: ModelId) -> list[int]:
        held = self._held_by.get(model)
        if held is not None:
            return held
        row = self.columns.row.get(model)
        if row is None:
            held = [worker for worker, seen in enumerate(self.workers) if model in seen.assigned]
        elif not self._held_at_first(row):
            held = []
        else:
            if self._order is None or self._starts is None:
                # Bindings by model: made when first asked for.
                self._order = np.argsort(self.binding_row, kind="stable")
                ordered = self.binding_row[self._order]
                self._starts = np.searchsorted(ordered, np.arange(len(self.columns.ids) + 1))
            found = self._order[self._starts[row] : self._starts[row + 1]]
            held = self.binding_worker[found].tolist()
        self._held_by[model] = held
        return held

    def _held_at_first(self, row: int) -> bool:
        # Whoever changes a model's bindings asks for its holders before.
        return bool(self.holding[row])

    def _touch(self, worker: int) -> None:
        if worker not in self._assigned:
            self._assigned[worker] = dict(self.workers[worker].assigned)
            self._sizes[worker] = dict(self.rooms[worker].sizes)

    def _counted(self, model: ModelId, worker: int, by: int, size: Footprint) -> None:
        row = self.columns.row.get(model)
        if row is None:
            return
        self.holding[row] += by
        if self.counts(model, worker):
            self.count[row] += by
            self.tenancy.add(model, by * whole_bytes(size))

    def _is_served(self, worker: int) -> bool:
        seen = self.workers[worker]
        if worker not in self._sizes:
            return self.rooms[worker].is_served(seen)
        held = self._sizes[worker].values()
        return not held or can_be_served(held, seen.budget_bytes, seen.host_bytes)


def is_asked(facts: ModelView) -> bool:
    """Whether anything waits for the model or runs on it."""
    return facts.waiting or facts.demand.backlog > 0


def _joined(parts: list[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
