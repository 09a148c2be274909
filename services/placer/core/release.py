"""What goes: what should not be where it is, what a device cannot hold, what nobody needs.

It takes half of one planning's work at most (`Planner.tidied`): what is left over is as true at the
next one, and goes then.
"""

from __future__ import annotations

import numpy as np

from services.placer.core.changes import Retire
from services.placer.core.columns import Bools
from services.placer.core.fleet import is_asked
from services.placer.core.planner import Planner
from services.placer.core.quotas import give_up, put_back
from shared.names import ModelId


def drop_strays(planner: Planner) -> None:
    """Bindings of models that are not active, of those that failed to load there, and of those
    that must not be there. Of the first none is left: all that follows is about active models."""
    fleet = planner.fleet
    for worker in np.unique(fleet.binding_worker[fleet.binding_row < 0]).tolist():
        for model in list(fleet.assigned(worker)):
            if model not in planner.columns.row:
                planner.remove(model, worker, "not active")
    for worker, seen in enumerate(fleet.workers):
        for model, error in seen.failed.items():
            if planner.tidied():
                return
            if model in fleet.assigned(worker) and not seen.is_bound(model):
                planner.remove(model, worker, f"failed to load: {error}")
    for model in planner.columns.placed:  # those with a word on where they may be
        if planner.tidied():
            return
        if fleet.holders(model):
            _drop_misplaced(planner, model)


def relieve_overfull(planner: Planner) -> None:
    """A measured footprint may be greater than the estimate that was planned with."""
    fleet = planner.fleet
    for worker in fleet.overfull():
        while fleet.is_overfull(worker):
            if planner.tidied():
                planner.unfinished = True  # it cannot serve them: not only at the next tick
                return
            planner.remove(_least_missed(planner, worker), worker, "the device is over its budget")


def relieve_quotas(planner: Planner) -> None:
    """Tenants that hold more than they may, as their quota was lowered or a worker came back: what
    they can do without goes; then what is idle, and copies of what has several, however new. The
    last copy of what is asked stays until it is idle: no request is dropped."""
    fleet = planner.fleet
    for tenant in fleet.tenancy.over():
        reason = f"tenant {fleet.tenancy.names[tenant]} holds more than it may"
        given = give_up(fleet, planner.chooser.victims, tenant, keep=None, left=0)
        put_back(fleet, given)
        for each in given:
            planner.give(each.model, each.worker, reason, reason)
        while tenant in fleet.tenancy.over():
            if planner.tidied():
                planner.unfinished = True
                return
            found = _least_needed(planner, tenant)
            if found is None:
                break
            planner.give(*found, reason, reason)


def _least_needed(planner: Planner, tenant: int) -> tuple[ModelId, int] | None:
    """Of the tenant's copies, the one that goes first when it holds too much."""
    fleet, columns, count = planner.fleet, planner.columns, planner.fleet.count
    idle = ~columns.asked & (planner.view.at - columns.last_active >= planner.policy.victim_idle_s)
    some = columns.present & (columns.tenant == tenant) & (count > 0) & (idle | (count > 1))
    rows = np.flatnonzero(some)
    if not len(rows):
        return None
    each = columns.need[rows] / count[rows]
    first = np.lexsort((columns.last_active[rows], each, columns.priority[rows], ~idle[rows]))[0]
    model = columns.ids[rows[first]]
    assert model is not None, "a row that a model has"
    held = [worker for worker in fleet.holders(model) if fleet.counts(model, worker)]
    return model, max(held, key=lambda worker: (fleet.assigned(worker)[model].since, worker))


def release_surplus(planner: Planner) -> None:
    """What nobody asks for any more, and copies more than are needed or allowed."""
    columns, count, policy = planner.columns, planner.fleet.count, planner.policy
    unasked = planner.view.at - columns.last_active >= policy.deactivate_after_s
    idle = columns.present & unasked & (columns.min_copies == 0) & ~columns.asked
    for model in planner.models(idle):
        if planner.tidied():
            break
        reason = f"nobody asked for {policy.deactivate_after_s:g} s"
        for worker in planner.fleet.holders(model):
            planner.remove(model, worker, reason, idle=True)
        planner.retire_model(Retire(model, reason))
    limit = np.minimum(columns.limit, max(planner.fleet.serving, 1))
    for model in planner.models(columns.present & ~idle & (count > limit)):
        if planner.tidied():
            break
        allowed = int(limit[columns.row[model]])
        _release(planner, model, allowed, f"may have {allowed} copies")
    _release_low(planner, columns.present & ~idle)


def _drop_misplaced(planner: Planner, model: ModelId) -> None:
    fleet, labels = planner.fleet, planner.chooser.labels
    facts = planner.view.models[model]
    matching = labels.matches(facts)
    for worker in fleet.holders(model):
        if matching is not None and not matching[worker]:
            planner.remove(model, worker, "the worker has not the labels that it asks for")
    label, taken = facts.placement.spread_by, set()
    if label is None:
        return
    serving = [worker for worker in fleet.holders(model) if fleet.serves[worker]]
    for worker in sorted(serving, key=lambda w: (fleet.assigned(w)[model].since, w)):
        domain = labels.domain(label, worker)
        if domain in taken:
            planner.remove(model, worker, f"another copy has the same {label}")
        taken.add(domain)


def _least_missed(planner: Planner, worker: int) -> ModelId:
    """What goes first from a device that is over its budget: the idle, the longest unused
    before; then what others have as well; then what is needed least."""

    def missed(model: ModelId) -> tuple[int, int, float, float, ModelId]:
        facts = planner.view.models.get(model)
        if facts is None:
            return (-1, 0, 0.0, 0.0, model)
        demand = facts.demand
        rank = 0 if not is_asked(facts) else 1 if len(planner.fleet.holders(model)) > 1 else 2
        if rank == 0:
            return (rank, facts.priority, demand.last_active, 0.0, model)
        return (rank, facts.priority, demand.need, demand.last_active, model)

    return min(planner.fleet.assigned(worker), key=missed)


def _release_low(planner: Planner, some: Bools) -> None:
    """Copies that have not been needed for a while, as `low_since` tells."""
    columns, policy, at = planner.columns, planner.policy, planner.view.at
    count = planner.fleet.count
    # What traffic it usually has is worth spare copies as long as memory is free.
    spare = columns.usual / (0.5 * policy.spare_above)
    floor = np.maximum(np.maximum(columns.min_copies, 1), spare.astype(np.int64))
    low = policy.release_utilization
    some = some & (count > floor) & (columns.need < low * (count - 1))
    for move in planner.pace.moves:
        if move.done is None and move.model in columns.row:
            some[columns.row[move.model]] = False
    since = np.where(np.isnan(columns.low_since), at, columns.low_since)
    hold = np.maximum(policy.hold_down_s, policy.hold_down_loads * columns.load_seconds)
    over = some & (at - since >= hold)
    noted = some & ~over
    for row in np.flatnonzero(over).tolist():
        if planner.tidied():
            noted[row:] |= over[row:]
            break
        model = columns.ids[row]
        assert model is not None, "a row that a model has"
        enough, least, need = int(count[row]), int(floor[row]), float(columns.need[row])
        while enough > least and need < low * (enough - 1):
            enough -= 1
        _release(planner, model, enough, f"{enough} have been enough for {hold[row]:g} s")
    planner.low_since = dict(zip(planner.models(noted), since[noted].tolist(), strict=True))


def _release(planner: Planner, model: ModelId, keep: int, reason: str) -> None:
    """Spare ones first, then the newest: what served the model before the spike stays."""
    fleet = planner.fleet

    def order(worker: int) -> tuple[bool, float, int]:
        binding = fleet.assigned(worker)[model]
        return (binding.spare, binding.since, worker)

    serving = [worker for worker in fleet.holders(model) if fleet.counts(model, worker)]
    for worker in sorted(serving, key=order)[keep:]:
        planner.remove(model, worker, reason)
