"""The models of a view as columns: one array per number, one row per model.

A tick looks at every active model and decides for a few. With 10,000 of them an object each is
too slow to make, and to look through; here all are judged at once, and only those for which
something is to be decided are looked at one by one (ADR 0011).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from services.placer.core.view import Demand, ModelView
from shared.models import Placement
from shared.names import ModelId

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

EVERYWHERE = Placement()
NOBODY = ("",)
ANY_NUMBER = 1 << 40
"""The limit of copies of a model that has none."""


class Columns(msgspec.Struct, frozen=True):
    """As `ModelView` and `Demand` say. Rows that no model has are not `present`."""

    row: Mapping[ModelId, int]
    ids: Sequence[ModelId | None]
    present: Bools
    need: Floats
    catching_up: Floats
    rate_fast: Floats
    rate_slow: Floats
    seconds: Floats
    """Per request."""
    asked: Bools
    """Something waits for it or runs on it."""
    last_active: Floats
    load_seconds: Floats
    low_since: Floats
    """nan: it has no copy too many."""
    min_copies: Ints
    limit: Ints
    priority: Ints
    placed: Sequence[ModelId]
    """Those with a word on where they may be (`Placement`)."""
    tenant: Ints
    """Whose each is: a number in `tenants`."""
    tenants: Sequence[str] = NOBODY
    """The first is nobody."""

    @property
    def usual(self) -> Floats:
        """Device-seconds per second of the traffic that each has as a rule, and still has: after
        a spike the slow average says for a minute what is over."""
        return np.minimum(self.rate_fast, self.rate_slow) * self.seconds


class Models(Mapping[ModelId, ModelView]):
    """The models of a view, of which each becomes an object only when it is looked at."""

    def __init__(
        self,
        columns: Columns,
        bases: Sequence[ModelView | None],
        *,
        ready: Ints,
        held: Ints,
        waiting: Bools,
        owner: object,
    ) -> None:
        """`bases`: by row, what does not change with demand. All is a snapshot, and so kept.
        `owner`: views of the same have the same rows."""
        self.columns = columns
        self.owner = owner
        self._bases = bases
        self._ready = ready
        self._held = held
        self._waiting = waiting
        self._made: dict[ModelId, ModelView] = {}

    def __repr__(self) -> str:
        return f"<Models {len(self)}>"

    def __len__(self) -> int:
        return len(self.columns.row)

    def __iter__(self) -> Iterator[ModelId]:
        return iter(self.columns.row)

    def __contains__(self, model: object) -> bool:
        return model in self.columns.row

    def __getitem__(self, model: ModelId) -> ModelView:
        made = self._made.get(model)
        if made is None:
            made = self._made[model] = self._make(self.columns.row[model])
        return made

    def facts(self, model: ModelId) -> ModelView | None:
        """What does not change with demand, sizes above all: cheaper than the whole."""
        row = self.columns.row.get(model)
        return None if row is None else self._bases[row]

    def _make(self, row: int) -> ModelView:
        base, columns = self._bases[row], self.columns
        assert base is not None, "a row that a model has"
        low_since = float(columns.low_since[row])
        return msgspec.structs.replace(
            base,
            demand=Demand(
                rate_fast=float(columns.rate_fast[row]),
                rate_slow=float(columns.rate_slow[row]),
                seconds_per_item=float(columns.seconds[row]),
                ready=int(self._ready[row]),
                held=int(self._held[row]),
                need=float(columns.need[row]),
                catching_up=float(columns.catching_up[row]),
                last_active=float(columns.last_active[row]),
            ),
            waiting=bool(self._waiting[row]),
            load_seconds=float(columns.load_seconds[row]),
            low_since=None if math.isnan(low_since) else low_since,
        )


def columns_of(models: Mapping[ModelId, ModelView]) -> Columns:
    """The columns of any models: at hand, or made one by one where the fleet is small."""
    if isinstance(models, Models):
        return models.columns
    views = list(models.values())
    demands = [facts.demand for facts in views]
    tenants = {"": 0}
    tenant = [tenants.setdefault(facts.tenant, len(tenants)) for facts in views]
    return Columns(
        row={model: row for row, model in enumerate(models)},
        ids=list(models),
        present=np.ones(len(views), bool),
        need=np.array([each.need for each in demands], float),
        catching_up=np.array([each.catching_up for each in demands], float),
        rate_fast=np.array([each.rate_fast for each in demands], float),
        rate_slow=np.array([each.rate_slow for each in demands], float),
        seconds=np.array([each.seconds_per_item for each in demands], float),
        asked=np.array([f.waiting or f.demand.backlog > 0 for f in views], bool),
        last_active=np.array([each.last_active for each in demands], float),
        load_seconds=np.array([f.load_seconds for f in views], float),
        low_since=np.array([np.nan if f.low_since is None else f.low_since for f in views], float),
        min_copies=np.array([f.min_copies for f in views], np.int64),
        limit=np.array([f.copies_limit(ANY_NUMBER) for f in views], np.int64),
        priority=np.array([f.priority for f in views], np.int64),
        placed=[f.model for f in views if f.placement != EVERYWHERE],
        tenant=np.array(tenant, np.int64),
        tenants=tuple(tenants),
    )


def facts_of(models: Mapping[ModelId, ModelView], model: ModelId) -> ModelView | None:
    """Of a model what does not change with demand; None when it is not there."""
    return models.facts(model) if isinstance(models, Models) else models.get(model)
