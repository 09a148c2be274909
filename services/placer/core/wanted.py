"""How many workers the fleet should have, and which one it would miss least. Who acts on it is
not the placer's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from services.placer.core.columns import columns_of
from services.placer.core.policy import Policy
from services.placer.core.refused import Refused
from services.placer.core.view import FleetSince, ModelView, View, WorkerView, copies
from shared.names import ModelId

Cause = Literal["demand", "no_place", "minimum", "spare", "idle"]
"""Why another number than there is, in a word, for metrics: more for what is asked, for what
fits nowhere, for the least that is to be there; fewer as the rest would do, or nobody asks."""


class Wanted(msgspec.Struct, frozen=True):
    """A number of workers, and why not another."""

    workers: int = 1
    reasons: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()
    """One for each reason."""


class LetGo(msgspec.Struct, frozen=True):
    """The worker that costs least to do without, and what it costs."""

    worker: str
    why: str


def workers_wanted(
    view: View,
    policy: Policy,
    *,
    unplaceable: Sequence[Refused],
    assigned_bytes: int,
    device_bytes: int,
    barred: float = 0.0,
) -> tuple[Wanted, FleetSince]:
    """More at once (after `grow_after_s`), fewer late (after `shrink_after_s`), one at a time,
    and only when the memory of the others would do, their hosts' included, where they have it.
    While an engine starts, a model without a place waits for it, not for yet another worker.
    Never fewer than `min_workers`; none at all only after `scale_to_zero_after_s` of silence.
    `barred`: demand of those whose tenants may have no more copies, however many workers come."""
    at, floor = view.at, policy.min_workers
    demand = float(columns_of(view.models).need.sum()) - barred
    serving = [worker for worker in view.workers.values() if worker.serves]
    present = len(serving)
    idle = idle_since(view)
    silent = not floor and idle is not None and at - idle >= policy.scale_to_zero_after_s

    reasons: dict[Cause, str] = {}
    # In silence what is left of a decaying demand is no reason: the last worker, which leaves for
    # that silence, is not to be followed by another.
    if demand > policy.grow_above * present and not silent:
        reasons["demand"] = (
            f"demand is {demand:.2f} device s/s, more than {policy.grow_above:.0%} of {present}"
        )
    if unplaceable:
        first = unplaceable[0]
        reasons["no_place"] = (
            f"no place for {len(unplaceable)} models, e.g. {first.model}: {first.refusal}"
        )
    if reasons:
        short = view.fleet_since.short if view.fleet_since.short is not None else at
        starting = "demand" not in reasons and any(not worker.takes_new for worker in serving)
        if starting:
            short = at  # judged anew with what it brings
        since = _since(view, short=short, idle=idle)
        if present and (starting or at - short < policy.grow_after_s):
            return Wanted(max(present, floor)), since
        count = max(present + 1, math.ceil(demand / policy.target_utilization - 1e-9), floor)
        return _for(count, reasons), since

    if present < floor:
        return _for(floor, {"minimum": f"there are to be {floor} at least"}), _since(
            view, idle=idle
        )
    if not present:
        return Wanted(0), _since(view, idle=idle)  # the first request changes that
    if silent:
        silence = f"nobody asked for anything for {policy.scale_to_zero_after_s:g} s"
        return _for(0, {"idle": silence}), _since(view, idle=idle)

    spare = present > max(floor, 1) and demand < policy.shrink_below * (present - 1)
    devices = [worker.budget_bytes for worker in serving]
    tiers = [worker.budget_bytes + worker.host_bytes for worker in serving]
    if spare and _spared(tiers) >= assigned_bytes and _spared(devices) >= device_bytes:
        ample = view.fleet_since.ample if view.fleet_since.ample is not None else at
        since = _since(view, ample=ample, idle=idle)
        if at - ample < policy.shrink_after_s:
            return Wanted(present), since
        reason = (
            f"demand is {demand:.2f} device s/s, less than {policy.shrink_below:.0%} of "
            f"{present - 1} for {policy.shrink_after_s:g} s"
        )
        return _for(present - 1, {"spare": reason}), since
    return Wanted(present), _since(view, idle=idle)


def idle_since(view: View) -> float | None:
    """Since when nobody has asked for anything; None while somebody does, or while a model is to
    have copies at all times. A fleet of which nothing is known begins to be idle now."""
    columns = columns_of(view.models)
    if (columns.present & ((columns.min_copies > 0) | columns.asked)).any():
        return None
    lasts = columns.last_active[columns.present].tolist()
    if view.fleet_since.idle is not None:
        lasts.append(view.fleet_since.idle)
    return max(lasts, default=view.at)


def cheapest_to_let_go(view: View) -> LetGo | None:
    """The worker that the fleet would miss least, of those that were not asked to leave yet:
    one that does not serve; else the least to load elsewhere and to do without. None when all
    leave. Those that alone have the labels some model asks for come last."""
    staying = [worker for worker in view.workers.values() if not worker.leaving]
    count = copies(view)
    needed = {worker.worker: _needed_by(worker, staying, view) for worker in staying}

    def cost(worker: WorkerView) -> tuple[bool, bool, float, int]:
        alone = [model for model in worker.assigned if count.get(model) == 1]
        return (
            worker.serves,
            needed[worker.worker] is not None,
            round(_missed(worker, alone, count, view), 6),
            len(alone),
        )

    # Of equals the last by name: with numbers in names the one that was started last.
    staying.sort(key=lambda worker: worker.worker, reverse=True)
    chosen = min(staying, key=cost, default=None)
    if chosen is None:
        return None
    if not chosen.serves:
        return LetGo(chosen.worker, "it serves nothing")
    _, _, missed, alone = cost(chosen)
    why = f"{alone} models are there alone; to move and to do without it costs {missed:.2f}"
    if needed[chosen.worker] is not None:
        why += f"; {needed[chosen.worker]} can be nowhere else"
    return LetGo(chosen.worker, why)


def _missed(
    worker: WorkerView, alone: Iterable[ModelId], count: dict[ModelId, int], view: View
) -> float:
    """Device-seconds per second that others must take over, and seconds of waiting per second
    until what only this worker has is loaded elsewhere."""
    missed = 0.0
    for model in worker.assigned:
        facts = view.models.get(model)
        if facts is not None:
            missed += facts.demand.need / max(count.get(model, 0), 1)
    for model in alone:
        facts = view.models.get(model)
        if facts is not None:
            rate = max(facts.demand.rate_slow, facts.demand.rate_fast)
            missed += rate * facts.load_seconds
    return missed


def _needed_by(worker: WorkerView, staying: Sequence[WorkerView], view: View) -> ModelId | None:
    """A model that may be on this worker and on no other that stays."""
    others = [other for other in staying if other is not worker and other.serves]
    for facts in view.models.values():
        if (
            facts.placement.worker_selector
            and _selected(worker, facts)
            and not any(_selected(other, facts) for other in others)
        ):
            return facts.model
    return None


def _selected(worker: WorkerView, facts: ModelView) -> bool:
    wanted = facts.placement.worker_selector
    return all(worker.labels.get(label) == value for label, value in wanted.items())


def _since(
    view: View, *, short: float | None = None, ample: float | None = None, idle: float | None
) -> FleetSince:
    return msgspec.structs.replace(view.fleet_since, short=short, ample=ample, idle=idle)


def _for(count: int, reasons: dict[Cause, str]) -> Wanted:
    return Wanted(count, tuple(reasons.values()), tuple(reasons))


def _spared(room: Sequence[int]) -> int:
    """What is left of it without the greatest."""
    return sum(room) - max(room)
