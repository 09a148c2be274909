"""How many workers the fleet should have. Who acts on it is not the placer's business."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from services.placer.core.fleet import Refused
from services.placer.core.policy import Policy
from services.placer.core.view import FleetSince, View


class Wanted(msgspec.Struct, frozen=True):
    """A number of workers, and why not another."""

    workers: int = 1
    reasons: tuple[str, ...] = ()


def workers_wanted(
    view: View,
    policy: Policy,
    *,
    unplaceable: Sequence[Refused],
    assigned_bytes: int,
    device_bytes: int,
) -> tuple[Wanted, FleetSince]:
    """More at once (after `grow_after_s`), fewer late (after `shrink_after_s`), one at a time,
    and only when the memory of the others would do, their hosts' included, where they have it.
    Never fewer than one."""
    demand = sum(facts.demand.need for facts in view.models.values())
    serving = [worker for worker in view.workers.values() if worker.serves]
    present = len(serving)

    reasons = []
    if demand > policy.grow_above * present:
        reasons.append(
            f"demand is {demand:.2f} device s/s, more than {policy.grow_above:.0%} of {present}"
        )
    if unplaceable:
        first = unplaceable[0]
        reasons.append(
            f"no place for {len(unplaceable)} models, e.g. {first.model}: {first.refusal}"
        )
    if reasons:
        short = view.fleet_since.short if view.fleet_since.short is not None else view.at
        if view.at - short < policy.grow_after_s and present:
            return Wanted(max(present, 1), ()), FleetSince(short=short)
        count = max(present + 1, math.ceil(demand / policy.target_utilization - 1e-9))
        return Wanted(count, tuple(reasons)), FleetSince(short=short)

    spare = present > 1 and demand < policy.shrink_below * (present - 1)
    devices = [worker.budget_bytes for worker in serving]
    tiers = [worker.budget_bytes + worker.host_bytes for worker in serving]
    if spare and _spared(tiers) >= assigned_bytes and _spared(devices) >= device_bytes:
        ample = view.fleet_since.ample if view.fleet_since.ample is not None else view.at
        if view.at - ample < policy.shrink_after_s:
            return Wanted(present, ()), FleetSince(ample=ample)
        reason = (
            f"demand is {demand:.2f} device s/s, less than {policy.shrink_below:.0%} of "
            f"{present - 1} for {policy.shrink_after_s:g} s"
        )
        return Wanted(present - 1, (reason,)), FleetSince(ample=ample)
    return Wanted(max(present, 1), ()), FleetSince()


def _spared(room: Sequence[int]) -> int:
    """What is left of it without the greatest."""
    return sum(room) - max(room)
