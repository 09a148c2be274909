"""What a tenant's own models give up for its others, or where its quota was lowered; whose turn it
is of several tenants."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from services.placer.core.columns import columns_of, facts_of
from services.placer.core.fleet import Fleet
from services.placer.core.tenancy import ANY_BYTES, Tenancy, whole_bytes
from services.placer.core.victims import Victims
from services.placer.core.view import Binding, expected
from shared.names import ModelId

Due = tuple[float, bool, int, float, float, ModelId]
"""By what is due first (`Planner._due`): since when it waits, if that is too long; whether it has a
copy; then what orders the models of one tenant."""


class Given(NamedTuple):
    """A copy that was taken from the fleet's picture."""

    model: ModelId
    worker: int
    binding: Binding


def give_up(
    fleet: Fleet, victims: Victims, tenant: int, *, keep: ModelId | None, left: int
) -> list[Given]:
    """Takes copies of the tenant's models from the picture, the least regretted first, until
    `left` bytes are free of its quota; as few as that takes. Never of `keep`. What is taken when
    there are not enough is all that there is."""
    given: list[Given] = []
    while _left(fleet, tenant) < left:
        ranked = [
            (rank, model, worker)
            for model in _candidates(fleet, tenant)
            if model != keep
            for worker in fleet.holders(model)
            if fleet.counts(model, worker) and (rank := victims.rank(worker, model)) is not None
        ]
        if not ranked:
            break
        # Of one model only the first: without that its others may be needed.
        seen: set[ModelId] = set()
        for _, model, worker in sorted(ranked):
            if _left(fleet, tenant) >= left:
                break
            if model not in seen:
                seen.add(model)
                given.append(take(fleet, model, worker))
    for each in list(given):
        size = whole_bytes(fleet.size_on(each.worker, each.model))
        if _left(fleet, tenant) - size >= left:
            put_back(fleet, [each])
            given.remove(each)
    return given


def make_way(
    fleet: Fleet, victims: Victims, newcomer: ModelId, least: int, most: int
) -> list[Given]:
    """What the newcomer's tenant gives up so that it may have one more copy, which counts between
    `least` and `most` bytes; taken from the picture. Nothing where it would be for nothing."""
    tenancy = fleet.tenancy
    tenant = tenancy.of(newcomer)
    need = most if most <= int(tenancy.quota[tenant]) else least
    given = give_up(fleet, victims, tenant, keep=newcomer, left=need)
    if tenancy.refusal(newcomer, need) is not None:
        put_back(fleet, given)
        return []
    return given


def barred(fleet: Fleet) -> float:
    """Of what all models are asked for, what no further worker would serve: their tenants may not
    have the copies. In device-seconds per second."""
    tenancy, columns = fleet.tenancy, fleet.columns
    if not tenancy.bounded or not fleet.workers:
        return 0.0
    need, total = columns_of(fleet.view.models).need, 0.0
    bounded = tenancy.quota[columns.tenant] < ANY_BYTES
    for row in np.flatnonzero(columns.present & bounded & (need > fleet.count)).tolist():
        model = columns.ids[row]
        assert model is not None, "a row that a model has"
        facts = facts_of(fleet.view.models, model)
        assert facts is not None, "it is present"
        size = whole_bytes(expected(fleet.workers[0].device_kind, facts))
        more = max(tenancy.left(model) or 0, 0) // max(size, 1)
        total += max(float(need[row]) - int(fleet.count[row]) - more, 0.0)
    return total


def by_turns(due: Sequence[Due], tenancy: Tenancy, spent: Callable[[], bool]) -> Iterator[ModelId]:
    """The models of several tenants that want more, which are sorted: between those that are as
    urgent the tenant is next that holds least over its share, as it is at that moment."""
    of: dict[int, deque[Due]] = {}
    for each in due:
        of.setdefault(tenancy.of(each[-1]), deque()).append(each)
    while of:
        tenant = min(of, key=lambda t: (*of[t][0][:2], tenancy.level(t), of[t][0]))
        yield of[tenant].popleft()[-1]
        if not of[tenant]:
            del of[tenant]
        if spent():  # nobody gets anything any more
            yield from (each[-1] for rest in of.values() for each in rest)
            return


def take(fleet: Fleet, model: ModelId, worker: int) -> Given:
    given = Given(model, worker, fleet.assigned(worker)[model])
    fleet.remove(model, worker)
    return given


def put_back(fleet: Fleet, given: list[Given]) -> None:
    for each in given:
        fleet.add(each.model, each.worker, each.binding)


def _left(fleet: Fleet, tenant: int) -> int:
    return int(fleet.tenancy.quota[tenant] - fleet.tenancy.held[tenant])


def _candidates(fleet: Fleet, tenant: int) -> list[ModelId]:
    """Its models that may have a copy to give."""
    columns, at = fleet.columns, fleet.view.at
    idle = ~columns.asked & (at - columns.last_active >= fleet.policy.victim_idle_s)
    some = columns.present & (columns.tenant == tenant) & (fleet.count > 0)
    some &= idle | (fleet.count > 1)
    ids = columns.ids
    return [model for row in np.flatnonzero(some).tolist() if (model := ids[row]) is not None]
