"""What workers could not load lately, and whose engine is down: told by their reports."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from services.placer.core.policy import Policy
from shared.control import Report
from shared.fit import can_be_served
from shared.names import ModelId


class _Failure(msgspec.Struct):
    incarnation: str
    until: float
    error: str


class Failures:
    """By worker. Times are those of the caller's clock."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._failed: dict[str, dict[ModelId, _Failure]] = {}
        self._down_since: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Failures of {len(self._failed)} workers, {len(self._down_since)} engines down>"

    def workers(self) -> Collection[str]:
        """Those that could not load something lately."""
        return list(self._failed)

    def of(self, worker: str) -> dict[ModelId, str]:
        """What the worker could not load lately, and why."""
        return {model: each.error for model, each in self._failed.get(worker, {}).items()}

    def engine_down(self, worker: str) -> bool:
        return worker in self._down_since

    def engine_down_long(self, worker: str, now: float) -> bool:
        """Longer than an engine takes to start again."""
        since = self._down_since.get(worker)
        return since is not None and now - since >= self._policy.engine_grace_s

    def forget(self, worker: str) -> None:
        """The worker is gone."""
        self._failed.pop(worker, None)
        self._down_since.pop(worker, None)

    def note(
        self, report: Report, wanted: Mapping[ModelId, object], generation: int, now: float
    ) -> bool:
        """Takes in the worker's report, new or not. `wanted`: what is assigned to it, as of
        `generation`. True when what it could not load is not the same any more."""
        worker, changed = report.worker, False
        if report.engine_up:
            self._down_since.pop(worker, None)
        else:
            self._down_since.setdefault(worker, now)
        known = self._failed.get(worker, {})
        for model, failure in list(known.items()):
            if failure.until <= now or failure.incarnation != report.incarnation:
                del known[model]
                changed = True
        if not known:
            self._failed.pop(worker, None)
        failed = [m for m in report.models if m.phase == "failed" and m.model in wanted]
        if not failed or report.generation < generation:
            return changed  # it speaks of an assignment that was changed since
        sizes = [m.footprint for m in report.models if m.model in wanted]
        if not can_be_served(sizes, report.budget_bytes, report.host_budget_bytes):
            # It was measured larger than planned with: the plan makes room, or moves it.
            return changed
        until = now + self._policy.retry_failed_s
        for told in failed:
            self._failed.setdefault(worker, {})[told.model] = _Failure(
                report.incarnation, until, told.error or "no reason"
            )
        return True
