"""What workers could not load lately, whose engine is down, and who has gone silent: told by
their reports, and by their absence."""

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
        self._suspects: dict[tuple[str, ModelId], float] = {}
        """Who suspects which model of having ended its engine, and until when that counts."""
        self._suspected: set[tuple[str, ModelId]] = set()
        """Of these, what counts."""
        self._down_since: dict[str, float] = {}
        self._heard: dict[str, float] = {}
        """When a report of each was last new."""
        self._listened: float | None = None
        self._silent: set[str] = set()

    def __repr__(self) -> str:
        return f"<Failures of {len(self._failed)} workers, {len(self._down_since)} engines down>"

    def workers(self) -> Collection[str]:
        """Those that could not load something lately."""
        return list(self._failed)

    def of(self, worker: str) -> dict[ModelId, str]:
        """What the worker could not load lately, and why."""
        return {model: each.error for model, each in self._failed.get(worker, {}).items()}

    def suspected(self, worker: str) -> dict[ModelId, str]:
        """What this worker is not to try, since another one suspects it, and tries it alone."""
        return {
            model: f"an engine of {other} ended as it was loaded: it is tried there first"
            for other, model in self._suspected
            if other != worker
        }

    def note_suspects(self, report: Report, now: float) -> bool:
        """Takes in whom the worker suspects. True when anybody's suspects are others now."""
        worker, before = report.worker, self._suspected
        told = {(worker, each.model) for each in report.models if each.suspect}
        if not (told or self._suspects):
            return False
        # An engine that does not come back says nothing of what was loading, and whoever was
        # suspected for so long is not suspected anew.
        limit = now + self._policy.retry_failed_s
        others = {key: until for key, until in self._suspects.items() if key[0] != worker}
        self._suspects = others | {key: self._suspects.get(key, limit) for key in told}
        self._suspected = {key for key, until in self._suspects.items() if until > now}
        return self._suspected != before

    def engine_down(self, worker: str) -> bool:
        return worker in self._down_since

    def engine_down_long(self, worker: str, now: float) -> bool:
        """Longer than an engine takes to start again."""
        since = self._down_since.get(worker)
        return since is not None and now - since >= self._policy.engine_grace_s

    def silent(self, worker: str) -> bool:
        return worker in self._silent

    def listen(self, heard: Collection[str], now: float) -> set[str]:
        """These have said something new since the last look. Returns who is silent and was not,
        and the other way round. A look that came late itself blames nobody."""
        limit, before = self._policy.silent_after_s, self._silent
        late = self._listened is not None and now - self._listened > limit / 2
        self._listened = now
        if late:
            self._heard = dict.fromkeys(self._heard, now)
        self._heard |= dict.fromkeys(heard, now)
        silent = {worker for worker, at in self._heard.items() if now - at > limit}
        if len(silent) > self._policy.silent_share * len(self._heard):
            silent = set()
        self._silent = silent
        return before ^ silent

    def forget(self, worker: str) -> bool:
        """The worker is gone. True when others may try now what it suspected."""
        self._heard.pop(worker, None)
        self._silent.discard(worker)
        self._failed.pop(worker, None)
        self._down_since.pop(worker, None)
        before = self._suspected
        self._suspects = {key: at for key, at in self._suspects.items() if key[0] != worker}
        self._suspected = {key for key in before if key[0] != worker}
        return self._suspected != before

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
