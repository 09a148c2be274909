"""The workers, as their reports tell of them: who is there and who leaves, who consumes what, what
somewhere could not be loaded, and how large models have proved to be.

Taking in reports costs what has changed since those before. Laws: `reports`, `reported` and the
views have the same workers; who leaves is one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.placer.consumers import Consumers
from services.placer.core.demand import DemandTracker
from services.placer.core.news import News, header, shows_the_same
from services.placer.core.policy import Policy
from services.placer.core.view import Binding
from services.placer.failures import Failures
from services.placer.history import History
from services.placer.picture import Active
from services.placer.worker_views import WorkerViews
from shared.control import ModelReport, Report
from shared.names import ModelId


class Workers:
    """See the module's text."""

    def __init__(
        self,
        tracker: DemandTracker,
        policy: Policy,
        history: History,
        active: Mapping[ModelId, Active],
        assigned: Mapping[str, Mapping[ModelId, Binding]],
        generations: Mapping[str, int],
    ) -> None:
        """The last three are the owner's own, and followed: what is active, what each worker is to
        have, and of which generation that is."""
        self.reports: dict[str, Report] = {}
        """The newest of each; never changed, but replaced."""
        self.reported: dict[str, dict[ModelId, ModelReport]] = {}
        """The same by model."""
        self.leaving: set[str] = set()
        """Workers that were asked to leave."""
        self.consumers = Consumers()
        self._tracker = tracker
        self._history = history
        self._active = active
        self._assigned = assigned
        self._generations = generations
        self._failures = Failures(policy)
        self.views = WorkerViews(
            tracker, policy, self._failures, active, self.reported, assigned, self.leaving
        )

    def __repr__(self) -> str:
        return f"<Workers {len(self.reports)}, {len(self.leaving)} leaving>"

    # --- what is seen -----------------------------------------------------------------------

    def see(self, reports: Iterable[Report], now: float) -> set[str]:
        """The newest report of every worker that is there. Returns who is gone."""
        before, self.reports = self.reports, {report.worker: report for report in reports}
        gone = before.keys() - self.reports.keys()
        for worker in gone:
            self._lose(worker)
        news = self._tracker.observe(self.reports.values(), {}, now)
        for worker in self._failures.workers():
            if worker not in news:
                self._note_failures(self.reports[worker], now)
        measured = set[ModelId]()
        for worker, new in news.items():
            self._take(self.reports[worker], before.get(worker), new, measured, now)
        for worker in self._failures.listen(news, now):
            self.views.changed(worker)
            silent = self._failures.silent(worker)
            what = "worker is silent" if silent else "worker is heard again"
            self._history.note(what, worker=worker)
        self.views.resized_models(measured)
        return gone

    def in_hand(self, model: ModelId) -> list[str]:
        """Workers that may hold messages of the model's queue: that consume it, that hold some,
        or that have not been seen to follow their last assignment."""
        found = []
        for worker, report in self.reports.items():
            seen = self.reported[worker].get(model)
            behind = report.generation < self._generations.get(worker, 0)
            if behind or (seen is not None and (seen.bound or seen.held)):
                found.append(worker)
        return found

    # --- who leaves -------------------------------------------------------------------------

    def leave(self, worker: str) -> bool:
        """The worker is to leave. False when it was to already."""
        if worker in self.leaving:
            return False
        self.leaving.add(worker)
        self.views.changed(worker)
        return True

    def stay(self, worker: str) -> bool:
        """Takes that back. False when nobody had asked it to leave."""
        if worker not in self.leaving:
            return False
        self.leaving.remove(worker)
        self.views.changed(worker)
        return True

    # --- parts ------------------------------------------------------------------------------

    def _take(
        self,
        report: Report,
        before: Report | None,
        news: News,
        measured: set[ModelId],
        now: float,
    ) -> None:
        """A report that is new. Adds to `measured` the models of which a size was learnt."""
        worker = report.worker
        self.reported[worker] = news.models
        self.consumers.take(worker, news)
        resized = bool(news.gone)
        seen = news.timed or before is None or header(before) != header(report)
        for was, told in news.changed:
            if was is None or was.footprint != told.footprint:
                resized = True
                if self._learn_size(report, told):
                    measured.add(told.model)
            if not seen:
                seen = was is None or not shows_the_same(was, told)
        self._note_failures(report, now)
        if resized:
            self.views.resized(worker)
        elif seen:
            self.views.changed(worker)

    def _learn_size(self, report: Report, told: ModelReport) -> bool:
        """What one worker measured holds for others of its kind, also after it is gone. True when
        it is new."""
        active = self._active.get(told.model)
        if active is None or not told.footprint.measured:
            return False
        kind = report.device_kind
        if active.known.get(kind) == told.footprint:
            return False
        active.known[kind] = told.footprint
        return True

    def _note_failures(self, report: Report, now: float) -> None:
        worker = report.worker
        if self._failures.note_suspects(report, now):
            self._all_changed()
        wanted, generation = self._assigned.get(worker, {}), self._generations.get(worker, 0)
        if self._failures.note(report, wanted, generation, now):
            self.views.changed(worker)

    def _lose(self, worker: str) -> None:
        self.consumers.lose(worker, self.reported.pop(worker, {}))
        self.views.forget(worker)
        if self._failures.forget(worker):
            self._all_changed()
        self.leaving.discard(worker)
        self._history.note("worker left", worker=worker, why="no report any more")

    def _all_changed(self) -> None:
        """Suspects of one worker are not to be tried by the others."""
        for each in self.reports:
            self.views.changed(each)
