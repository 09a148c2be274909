"""Tenants on one fleet: what their models hold, what they may, and what device time each is to
have where there is too little for all (ADR 0027). Bytes are those of copies that count
(`Fleet.counts`), each in full: weights and workspace, also what models have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
import numpy as np

from services.placer.core.changes import Held
from services.placer.core.columns import Columns, Floats, Ints
from services.placer.core.view import Quota
from shared.fit import Refusal
from shared.models import Footprint
from shared.names import ModelId

UNBOUNDED: Final = Quota()
ANY_BYTES: Final = 1 << 62
"""The quota of a tenant that has none."""


class Tenancy:
    """Of the tenants of a view's models, by number as in `Columns.tenants`."""

    def __init__(self, columns: Columns, quotas: Mapping[str, Quota]) -> None:
        self.names = columns.tenants
        self.several = len(self.names) > 1 and _several(columns)
        """There is somebody to share with."""
        told = [quotas.get(name, UNBOUNDED) for name in self.names]
        self.bounded = any(each.device_bytes is not None for each in told)
        self.counts = len(self.names) > 1
        """What each holds is counted: not all is nobody's."""
        self.share: Floats = np.array([each.share for each in told], float)
        self.quota: Ints = np.array(
            [ANY_BYTES if each.device_bytes is None else each.device_bytes for each in told],
            np.int64,
        )
        self.held: Ints = np.zeros(len(told), np.int64)
        self._columns = columns

    def __repr__(self) -> str:
        return f"<Tenancy {dict(zip(self.names, self.held.tolist(), strict=True))}>"

    def of(self, model: ModelId) -> int:
        """Number of its tenant; the first, nobody, for a model that is not active."""
        row = self._columns.row.get(model)
        return 0 if row is None else int(self._columns.tenant[row])

    def left(self, model: ModelId) -> int | None:
        """Bytes that further copies of the tenant may take; below 0 where it holds more than it
        may. None: it has no quota."""
        if not self.bounded:
            return None
        tenant = self.of(model)
        quota = int(self.quota[tenant])
        return None if quota == ANY_BYTES else quota - int(self.held[tenant])

    def refusal(self, model: ModelId, need_bytes: int) -> Refusal | None:
        """Why its tenant may not have so many bytes more."""
        left = self.left(model)
        if left is None or need_bytes <= left:
            return None
        tenant = self.of(model)
        held, quota = int(self.held[tenant]), int(self.quota[tenant])
        told = f"tenant {self.names[tenant]} holds {held:,} of {quota:,} bytes"
        return Refusal(told, need_bytes, max(left, 0))

    def over(self) -> list[int]:
        """Tenants that hold more than they may."""
        return np.flatnonzero(self.held > self.quota).tolist() if self.bounded else []

    def level(self, tenant: int, more_bytes: int = 0) -> float:
        """Bytes that the tenant holds, with so many more, over its share."""
        return (float(self.held[tenant]) + more_bytes) / float(self.share[tenant])

    def told(self, asked: Columns, given: Columns) -> tuple[Held, ...]:
        """What each has that has models. `asked` and `given`: demand, and what may be had of it."""
        if not self.counts:
            return ()
        models = np.bincount(asked.tenant[asked.present], minlength=len(self.names))
        need, had = self._sum(asked), self._sum(given)
        return tuple(
            Held(self.names[n], int(self.held[n]), float(need[n]), float(had[n]), int(models[n]))
            for n in np.flatnonzero(models).tolist()
        )

    def _sum(self, columns: Columns) -> Floats:
        total: Floats = np.zeros(len(self.names))
        np.add.at(total, columns.tenant[columns.present], columns.need[columns.present])
        return total

    def add(self, model: ModelId, nbytes: int) -> None:
        """One of its copies came (below 0: went)."""
        if self.counts and model in self._columns.row:
            self.held[self.of(model)] += nbytes


def whole_bytes(size: Footprint) -> int:
    """What counts of a copy."""
    return size.weights_bytes + size.workspace_bytes


def fairly(columns: Columns, tenancy: Tenancy, serving: int, capacity: float) -> Columns:
    """With the demand of whoever asks for more than its share brought down to it, where all
    together ask for more than `capacity` device-seconds per second: water-filling, so that who
    asks for less than its share is given all of that, and the others what is left, by share.
    Within a tenant all are brought down alike."""
    if not tenancy.several:
        return columns
    usable = np.minimum(columns.need, np.minimum(columns.limit, serving))
    demand: Floats = np.zeros(len(tenancy.names))
    np.add.at(demand, columns.tenant, usable)
    if float(demand.sum()) <= capacity:
        return columns
    given = water_fill(demand, tenancy.share, capacity)
    part = np.divide(given, demand, out=np.ones(len(demand)), where=given < demand)
    by_row = part[columns.tenant]
    need = np.where(by_row < 1.0, usable * by_row, columns.need)
    of_need = np.divide(need, columns.need, out=np.ones(len(need)), where=columns.need > 0)
    return msgspec.structs.replace(columns, need=need, catching_up=columns.catching_up * of_need)


def water_fill(demand: Floats, share: Floats, capacity: float) -> Floats:
    """What each is given of the capacity: what it asks for, or its share of what those leave who
    ask for less than theirs."""
    given: Floats = np.zeros(len(demand))
    left, weights = capacity, float(share[demand > 0].sum())
    for tenant in np.argsort(demand / share, kind="stable").tolist():
        if demand[tenant] <= 0:
            continue
        given[tenant] = min(float(demand[tenant]), left * float(share[tenant]) / weights)
        left -= float(given[tenant])
        weights -= float(share[tenant])
    return given


def _several(columns: Columns) -> bool:
    present = columns.tenant[columns.present]
    return bool(len(present)) and bool((present != present[0]).any())
