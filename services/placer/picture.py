"""The active models as columns, for views: what does not change with demand is kept from one
view to the next, what does is the tracker's (ADR 0011)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np

from services.placer.core.columns import (
    ANY_NUMBER,
    EVERYWHERE,
    Bools,
    Columns,
    Floats,
    Ints,
    Models,
)
from services.placer.core.demand import DemandTracker
from services.placer.core.policy import Policy
from services.placer.core.view import ModelView
from shared.models import Footprint, Manifest
from shared.names import ModelId

_DEFAULT_TARGET_S = 0.1


class Active:
    """One active model."""

    __slots__ = (
        "_estimate", "_known", "_least_copies", "_manifest", "backlog_since", "base", "bound_keys",
        "declared", "depth", "looked_into", "profiled", "requests_per_message", "routed_at",
        "waiting_at",
    )  # fmt: skip

    def __init__(self, manifest: Manifest | None) -> None:
        self._manifest = manifest
        self._least_copies = 0
        self.declared = False
        """Whether its queue was declared by this placer."""
        self._known: dict[str, Footprint] = {}
        self._estimate: Footprint | None = None
        self.looked_into = False
        """Whether it was asked."""
        self.profiled: frozenset[str] = frozenset()
        """Kinds of device for which the repository was asked what was measured of it."""
        self.depth = 0
        """Requests that wait in its queue, by what its messages hold on average."""
        self.requests_per_message = 1.0
        self.backlog_since: float | None = None
        """Since when something has been seen waiting in its queue at every look."""
        self.waiting_at: float | None = None
        """When a request was last put into its queue while nobody consumed it."""
        self.bound_keys: set[str] | None = None
        """Routing keys that lead to its queue; None: not known (an earlier placer's)."""
        self.routed_at = 0.0
        """When its keys were last bound."""
        self.base: ModelView | None = None
        """What views say of it apart from demand; None: to be made anew."""

    def __repr__(self) -> str:
        return f"<Active {'?' if self.manifest is None else self.manifest.id}>"

    @property
    def manifest(self) -> Manifest | None:
        return self._manifest

    @manifest.setter
    def manifest(self, manifest: Manifest | None) -> None:
        self._manifest, self.base = manifest, None

    @property
    def least_copies(self) -> int:
        """It is to have so many, whatever its manifest says."""
        return self._least_copies

    @least_copies.setter
    def least_copies(self, copies: int) -> None:
        self._least_copies, self.base = copies, None

    @property
    def known(self) -> dict[str, Footprint]:
        """Measured footprints by kind of device."""
        return self._known

    @known.setter
    def known(self, known: dict[str, Footprint]) -> None:
        self._known, self.base = known, None

    @property
    def estimate(self) -> Footprint | None:
        """What the repository read in its file."""
        return self._estimate

    @estimate.setter
    def estimate(self, estimate: Footprint | None) -> None:
        self._estimate, self.base = estimate, None

    def view(self, model: ModelId, *, default: bool) -> ModelView:
        """`default`: this version is what the model's name, or an alias, means."""
        manifest = self._manifest
        if manifest is None:
            return ModelView(
                model=model,
                min_copies=self._least_copies,
                known=self._known,
                target_s=_DEFAULT_TARGET_S,
            )
        return ModelView(
            model=model,
            size_bytes=manifest.size_bytes,
            # A version that only its number leads to is not kept warm: few clients mean it.
            min_copies=max(manifest.min_copies if default else 0, self._least_copies),
            max_copies=manifest.max_copies,
            stateful=manifest.stateful,
            priority=manifest.priority,
            known=self._known,
            estimate=self._estimate,
            target_s=manifest.target_ms / 1000,
            placement=manifest.placement,
            tenant=manifest.tenant,
        )


class _Still(msgspec.Struct):
    """What does not change with demand, by the tracker's rows. Never changed once a view has it:
    replaced as a whole."""

    row: dict[ModelId, int]
    ids: list[ModelId | None]
    bases: list[ModelView | None]
    present: Bools
    target_s: Floats
    min_copies: Ints
    limit: Ints
    priority: Ints
    placed: dict[ModelId, None]
    tenant: Ints
    tenants: dict[str, int]

    def copy(self, rows: int) -> _Still:
        more = max(rows - len(self.ids), 0)

        def longer(column: Ints) -> Ints:
            return np.concatenate([column, np.zeros(more, np.int64)])

        return _Still(
            row=self.row.copy(),
            ids=self.ids + [None] * more,
            bases=self.bases + [None] * more,
            present=np.concatenate([self.present, np.zeros(more, bool)]),
            target_s=np.concatenate([self.target_s, np.full(more, _DEFAULT_TARGET_S)]),
            min_copies=longer(self.min_copies),
            limit=longer(self.limit),
            priority=longer(self.priority),
            placed=self.placed.copy(),
            tenant=longer(self.tenant),
            tenants=self.tenants.copy(),
        )

    def put(self, row: int, base: ModelView) -> None:
        self.row[base.model] = row
        self.ids[row] = base.model
        self.bases[row] = base
        self.present[row] = True
        self.target_s[row] = base.target_s
        self.min_copies[row] = base.min_copies
        self.limit[row] = base.copies_limit(ANY_NUMBER)
        self.priority[row] = base.priority
        self.tenant[row] = self.tenants.setdefault(base.tenant, len(self.tenants))
        if base.placement != EVERYWHERE:
            self.placed[base.model] = None

    def remove(self, model: ModelId) -> None:
        row = self.row.pop(model)
        self.ids[row] = self.bases[row] = None
        self.present[row] = False
        self.placed.pop(model, None)


class Picture:
    """Makes the `Models` of views."""

    def __init__(self, tracker: DemandTracker, policy: Policy) -> None:
        self._tracker = tracker
        self._policy = policy
        none, ints = np.zeros(0), np.zeros(0, np.int64)
        absent = np.zeros(0, bool)
        self._still = _Still({}, [], [], absent, none, ints, ints, ints, {}, ints, {"": 0})
        self._warm: dict[ModelId, bool] = {}
        """Models with `min_copies`, and whether they were the default."""

    def __repr__(self) -> str:
        return f"<Picture {len(self._still.row)} models>"

    def refresh(
        self, active: Mapping[ModelId, Active], defaults: Mapping[ModelId, bool], now: float
    ) -> list[ModelId]:
        """Takes in what changed since the last view. Returns models whose sizes may be others
        than they were. `defaults`: of the models of `warm`, which are their name's default."""
        new = [(model, each) for model, each in active.items() if each.base is None]
        new += [
            (model, active[model])
            for model, default in defaults.items()
            if model in active and self._warm.get(model) != default
        ]
        gone = () if len(self._still.row) + len(new) == len(active) else self._gone(active)
        if not new and not gone:
            return []
        rows = self._tracker.rows
        taken = {model: rows.take(model, now) for model, _ in new}
        still = self._still.copy(len(rows.ids))
        for model in gone:
            still.remove(model)
            self._warm.pop(model, None)
        for model, row in taken.items():
            if still.row.get(model, row) != row:
                still.remove(model)  # it was forgotten and came back
        for model, each in new:
            default = defaults.get(model, True)
            each.base = each.view(model, default=default)
            still.put(taken[model], each.base)
            if each.manifest is not None and each.manifest.min_copies:
                self._warm[model] = default
        self._still = still
        return [model for model, _ in new]

    @property
    def warm(self) -> Iterable[ModelId]:
        """Models that are to have copies at all times while they are their name's default."""
        return self._warm

    def models_with(
        self,
        model: ModelId,
        newcomer: Active,
        asked: Mapping[ModelId, Active],
        low_since: Mapping[ModelId, float],
        now: float,
    ) -> Models:
        """The same, as if the model were active, of which nothing is kept."""
        rows, kept = self._tracker.rows, self._still
        known = model in rows.row
        row = rows.take(model, now)
        self._still = kept.copy(len(rows.ids))
        self._still.put(row, newcomer.view(model, default=True))
        try:
            return self.models(asked, low_since)
        finally:
            self._still = kept
            if not known:
                rows.drop(model)

    def models(self, asked: Mapping[ModelId, Active], low_since: Mapping[ModelId, float]) -> Models:
        """A snapshot of all models as refreshed last, with their demand. `asked`: those of which
        something waits in the queue, at least."""
        still, rows, policy = self._still, self._tracker.rows, self._policy
        size = len(still.ids)
        ready, waiting = np.zeros(size, np.int64), np.zeros(size, bool)
        for model, one in asked.items():
            row = still.row.get(model)
            if row is not None:
                ready[row], waiting[row] = one.depth, one.waiting_at is not None
        low = np.full(size, np.nan)
        for model, since in low_since.items():
            row = still.row.get(model)
            if row is not None:
                low[row] = since
        seconds, held = rows.seconds[:size].copy(), rows.held[:size].copy()
        fast, slow = rows.fast[:size].copy(), rows.slow[:size].copy()
        load_seconds = rows.load_seconds[:size].copy()
        # As `DemandTracker.demand` says for one.
        horizon = np.maximum(0.5 * still.target_s, load_seconds)
        horizon = np.maximum(horizon, policy.shortest_horizon_s)
        catching_up = seconds * (ready + held) / horizon
        need = seconds * np.maximum(fast, slow) + catching_up
        need[~still.present] = 0.0
        columns = Columns(
            row=still.row,
            ids=still.ids,
            present=still.present,
            need=need,
            catching_up=catching_up,
            rate_fast=fast,
            rate_slow=slow,
            seconds=seconds,
            asked=waiting | (ready + held > 0),
            last_active=rows.last_active[:size].copy(),
            load_seconds=load_seconds,
            low_since=low,
            min_copies=still.min_copies,
            limit=still.limit,
            priority=still.priority,
            placed=tuple(still.placed),
            tenant=still.tenant,
            tenants=tuple(still.tenants),
        )
        return Models(
            columns,
            still.bases,
            ready=ready,
            held=held,
            waiting=waiting,
            owner=self._tracker,
        )

    def _gone(self, active: Mapping[ModelId, Active]) -> list[ModelId]:
        return [model for model in self._still.row if model not in active]
