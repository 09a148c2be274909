"""The workers as views show them: kept from one view to the next, and made anew where something
has changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import msgspec

from services.placer.core.columns import Models
from services.placer.core.demand import DemandTracker
from services.placer.core.policy import Policy
from services.placer.core.rooms import Room
from services.placer.core.view import Binding, WorkerView
from services.placer.failures import Failures
from services.placer.picture import Active
from shared.control import ModelReport, Report
from shared.names import ModelId

_NEGLIGIBLE_S = 1e-3
"""Seconds of loading that are not worth to be remembered."""


class WorkerViews:
    """Makes the `WorkerView`s of views. Its owner says what has changed."""

    def __init__(
        self,
        tracker: DemandTracker,
        policy: Policy,
        failures: Failures,
        active: Mapping[ModelId, Active],
        reported: Mapping[str, Mapping[ModelId, ModelReport]],
        assigned: Mapping[str, Mapping[ModelId, Binding]],
        leaving: Collection[str],
    ) -> None:
        """The last four are the owner's own, and followed."""
        self._tracker = tracker
        self._policy = policy
        self._failures = failures
        self._active = active
        self._reported = reported
        self._assigned = assigned
        self._leaving = leaving
        self._views: dict[str, WorkerView] = {}
        """As last made, of workers of which nothing has changed since."""
        self._rooms: dict[str, Room] = {}
        """Likewise, of workers where neither sizes nor the assignment have changed."""
        self._shares: dict[str, bool] = {}
        """Whether each seems to share what models have in common."""
        self._copied: dict[str, tuple[float, float]] = {}
        """Seconds of loading given to a worker, decaying, as of when."""

    def __repr__(self) -> str:
        return f"<WorkerViews of {len(self._reported)} workers, {len(self._views)} kept>"

    # --- what has changed -------------------------------------------------------------------

    def changed(self, worker: str) -> None:
        """Something that its view shows, but neither sizes nor what is assigned."""
        self._views.pop(worker, None)

    def reassigned(self, worker: str) -> None:
        self._views.pop(worker, None)
        self._rooms.pop(worker, None)

    def resized(self, worker: str) -> None:
        """What it told of sizes."""
        self.reassigned(worker)
        self._shares.pop(worker, None)

    def resized_models(self, models: Collection[ModelId]) -> None:
        """These may take another room than was thought, wherever they are."""
        changed = set(models)
        for worker, reported in self._reported.items() if changed else ():
            assigned = self._assigned.get(worker, {})
            if not (changed.isdisjoint(reported) and changed.isdisjoint(assigned)):
                self.resized(worker)

    def charge(self, worker: str, load_s: float, now: float) -> None:
        """It was given so much to load (`Policy.load_share`)."""
        if load_s:
            self._copied[worker] = (self._copied_s(worker, now) + load_s, now)

    def forget(self, worker: str) -> None:
        """The worker is gone."""
        self.resized(worker)
        self._copied.pop(worker, None)

    # --- what is shown ----------------------------------------------------------------------

    def view(self, report: Report, models: Models, now: float) -> WorkerView:
        """The worker that reports this."""
        worker = report.worker
        seen = self._views.get(worker)
        if seen is None:
            seen = self._make(worker, report, models, now)
            if not self._failures.engine_down(worker):
                self._views[worker] = seen
        if worker in self._copied:
            seen = msgspec.structs.replace(seen, copied_s=self._copied_s(worker, now))
        return seen

    # --- parts ------------------------------------------------------------------------------

    def _make(self, worker: str, report: Report, models: Models, now: float) -> WorkerView:
        down_long = self._failures.engine_down_long(worker, now)
        leaving, silent = worker in self._leaving, self._failures.silent(worker)
        reported = self._reported.get(worker, {})
        failed, suspects = self._failed(worker)
        room = self._rooms.get(worker)
        if room is not None:
            room.follow(reported)  # it tells the same sizes, or the room would be gone
        seen = WorkerView(
            worker=worker,
            device_kind=report.device_kind,
            budget_bytes=report.budget_bytes if report.engine_up else 0,
            host_bytes=report.host_budget_bytes if report.engine_up else 0,
            takes_new=report.engine_up and not (report.draining or leaving or silent),
            serves=not (report.draining or down_long or leaving),
            stalled=silent or not report.engine_up,
            leaving=leaving,
            # As it was for the room, while that holds.
            assigned=dict(self._assigned.get(worker, {})) if room is None else room.assigned,
            reported=reported,
            shares=self._sharing(worker),
            failed=failed,
            suspects=suspects,
            labels={"worker": worker, "device_kind": report.device_kind, **report.labels},
            slowness=self._tracker.slowness(worker),
            room=room,
        )
        if room is None:
            room = self._rooms[worker] = Room(seen, models, models.columns.row)
            seen = msgspec.structs.replace(seen, room=room)
        return seen

    def _failed(self, worker: str) -> tuple[dict[ModelId, str], Collection[ModelId]]:
        """What it has not to be given, and what of that others suspect; what it has already it
        keeps then."""
        suspected, has = self._failures.suspected(worker), self._assigned.get(worker, {})
        own = self._failures.of(worker)
        elsewhere = {model: why for model, why in suspected.items() if model not in has}
        return elsewhere | own, elsewhere.keys() - own.keys()

    def _sharing(self, worker: str) -> bool:
        """A worker that has models with common parts, and shares none, is not set to share."""
        known = self._shares.get(worker)
        if known is None:
            known = self._shares[worker] = self._seems_to_share(worker)
        return known

    def _seems_to_share(self, worker: str) -> bool:
        apart = False
        for model, report in self._reported.get(worker, {}).items():
            if report.footprint.shares:
                return True
            active = self._active.get(model)
            common = active is not None and active.estimate is not None and active.estimate.shares
            apart = apart or bool(common and report.footprint.weights_bytes)
        return not apart

    def _copied_s(self, worker: str, now: float) -> float:
        seconds, at = self._copied.get(worker, (0.0, now))
        left = seconds * math.exp(-(now - at) / self._policy.load_window_s)
        if left < _NEGLIGIBLE_S:
            self._copied.pop(worker, None)
            return 0.0
        return left
