"""How much of the fleet each model asks for, from counters in reports and depths of queues.

Arrivals are counted per incarnation of a worker: a counter that starts again is no negative
arrival, and what a worker counted before this placer first saw it is history, not a spike. The
same holds for each model: a worker leaves idle ones out and may bring them back, with its old
counter or with a new one.
Rates are moving averages over time, not over ticks, so that they mean the same at any tick. But
an average takes its time to see a spike: what is counted in one interval and can hardly be chance
counts at once.

Backlog is to be worked off within half the model's latency target. A backlog that is gone
before another copy could be loaded is no reason for one, so the time to load counts as well.

Models are rows of arrays (`core.tracked`): a look costs what is new in reports (`core.news`),
and a few operations on whole columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from services.placer.core.columns import Ints
from services.placer.core.news import News, compare
from services.placer.core.policy import Policy
from services.placer.core.tracked import Tracked
from services.placer.core.view import Demand
from shared.control import ModelReport, Report
from shared.names import ModelId

SHORTEST_INTERVAL_S = 0.05
"""Two reports closer than this are taken as one: a rate over less is noise."""
_SURE_BY = 2.0
"""Standard deviations of a Poisson count, each of which is its root: a count is above its mean by
more than these in 1 of 40 intervals."""
NEGLIGIBLE_RATE = 1e-4
"""Requests per second below which a model's averages are forgotten."""


class _Worker:
    """What was last counted and measured of one worker."""

    __slots__ = (
        "at", "base", "dropped", "incarnation", "measured", "newest", "own", "rates", "report",
        "seen", "seq",
    )  # fmt: skip

    def __init__(self, report: Report, now: float) -> None:
        self.report = report
        self.newest: Mapping[ModelId, ModelReport] = {}
        """Its models, as measured last."""
        self.rates: dict[ModelId, tuple[float, float]] = {}
        """Requests per second since the report before, and what of it is no chance."""
        self.measured: Ints | None = None
        """Rows of the models that it has measured; None: to be found anew."""
        self.own = 0.0
        """Sum of its own seconds per request of these."""
        self.dropped = 0
        self.base: dict[ModelId, int | None] = {}
        """Counters as counted last, of models of which anything is new since; None: not told."""
        self.count_from(report, now)

    def count_from(self, report: Report, now: float) -> None:
        """Arrivals are counted from this report on."""
        self.incarnation = report.incarnation
        self.seq = report.seq
        self.at = report.at
        self.seen = now
        self.base = {}

    def take(self, report: Report, news: News) -> None:
        """What a newer report tells."""
        base = self.base
        for was, told in news.changed:
            if told.model not in base:
                base[told.model] = None if was is None else was.arrived
            if was is None or was.seconds_per_item != told.seconds_per_item:
                self.measured = None
        for was in news.gone:
            base.setdefault(was.model, was.arrived)
            self.measured = None
        self.newest, self.report = news.models, report


class DemandTracker:
    """Follows the demand of all models that any worker mentions.

    Laws: rates are never negative; a model's `last_active` never goes back while it is kept.
    """

    def __init__(self, policy: Policy) -> None:
        self.rows = Tracked()
        self._policy = policy
        self._workers: dict[str, _Worker] = {}
        self._at: float | None = None

    def __repr__(self) -> str:
        return f"<DemandTracker models={len(self.rows.row)} workers={len(self._workers)}>"

    def touch(self, model: ModelId, now: float) -> None:
        """Something was asked of the model that no worker has counted (yet)."""
        row = self.rows.take(model, now)  # before: a column may be replaced by a longer one
        self.rows.last_active[row] = now

    def forget(self, model: ModelId) -> None:
        """What is known of it goes; what a worker tells of it next is new."""
        self.rows.drop(model)
        for worker in self._workers.values():
            if model in worker.newest:
                worker.newest = {m: told for m, told in worker.newest.items() if m != model}
                worker.base.pop(model, None)

    def observe(
        self, reports: Iterable[Report], depths: Mapping[ModelId, int], now: float
    ) -> dict[str, News]:
        """Takes in the newest report of every worker, and the depths that were asked for.
        Returns what is new in those reports that are, by worker."""
        present, news = set(), dict[str, News]()
        for report in reports:
            present.add(report.worker)
            last = self._workers.get(report.worker)
            if last is None or last.report is not report:
                news[report.worker] = self._take(report, last, now)
        for gone in self._workers.keys() - present:
            self._lose(self._workers.pop(gone))
        self._look(depths, now)
        return news

    def demand(self, model: ModelId, ready: int, target_s: float, now: float) -> Demand:
        """What is asked of the model now. `ready`: messages in its queue."""
        rows = self.rows
        row = rows.row.get(model)
        if row is None:
            return Demand(ready=ready, last_active=now)
        held, load_seconds = int(rows.held[row]), float(rows.load_seconds[row])
        fast, slow = float(rows.fast[row]), float(rows.slow[row])
        horizon = max(0.5 * target_s, self._policy.shortest_horizon_s, load_seconds)
        # Without a measurement there is no telling what a second copy would bring.
        seconds = float(rows.seconds[row])
        catching_up = seconds * (ready + held) / horizon
        return Demand(
            rate_fast=fast,
            rate_slow=slow,
            seconds_per_item=seconds,
            ready=ready,
            held=held,
            need=seconds * max(fast, slow) + catching_up,
            catching_up=catching_up,
            last_active=float(rows.last_active[row]),
        )

    def load_seconds(self, model: ModelId) -> float:
        """The longest load time reported of the model; 0 when none was."""
        row = self.rows.row.get(model)
        return 0.0 if row is None else float(self.rows.load_seconds[row])

    def slowness(self, worker: str) -> float:
        """The worker's own seconds per request over the mean of all that measured them, over
        the models that it has; 1.0 when nothing was measured."""
        known = self._workers.get(worker)
        if known is None:
            return 1.0
        rows = self.rows
        if known.measured is None or known.dropped != rows.dropped:
            found = [
                (row, told.seconds_per_item)
                for model, told in known.newest.items()
                if told.seconds_per_item > 0 and (row := rows.row.get(model)) is not None
            ]
            known.measured = np.array([row for row, _ in found], np.int64)
            known.own = math.fsum(seconds for _, seconds in found)
            known.dropped = rows.dropped
        mean = float(rows.seconds[known.measured].sum())
        return known.own / mean if mean > 0 else 1.0

    # --- parts ------------------------------------------------------------------------------

    def _take(self, report: Report, last: _Worker | None, now: float) -> News:
        """A report that is new: arrivals first, then what is so now."""
        rows = self.rows
        if last is None:
            news = compare({}, report)
            for told in report.models:
                rows.take(told.model, _last_used(told, report, now))
            last = self._workers[report.worker] = _Worker(report, now)
            last.newest, last.report = news.models, report
        else:
            news = compare(last.newest, report)
            last.take(report, news)
            if last.incarnation != report.incarnation or report.seq != last.seq:
                self._count(report, last, now)
        for was, told in news.changed:
            if (
                was is None
                or was.held != told.held
                or was.seconds_per_item != told.seconds_per_item
                or was.load_seconds != told.load_seconds
            ):
                rows.measure(rows.take(told.model, now), was, told)
        self._leave(news.gone)
        return news

    def _count(self, report: Report, last: _Worker, now: float) -> None:
        restarted = last.incarnation != report.incarnation
        elapsed = now - last.seen if restarted else report.at - last.at
        if elapsed < 0:
            elapsed = now - last.seen
        if elapsed < SHORTEST_INTERVAL_S:
            return
        rows, rates = self.rows, dict[ModelId, tuple[float, float]]()
        base = dict.fromkeys(last.newest, 0) if restarted else last.base
        for model, before in base.items():
            told = last.newest.get(model)
            if told is None or told.arrived == before:
                continue
            if before is not None:
                arrivals = told.arrived - before if told.arrived > before else told.arrived
            else:
                # A new baseline. What the worker has in hand came since it last reported; what
                # it has answered may be history, and one report too few does no harm.
                arrivals = min(told.held, told.arrived)
                used = _last_used(told, report, now)
                row = rows.take(model, used)
                rows.last_active[row] = max(rows.last_active[row], used)
            if arrivals:
                sure = max(arrivals - _SURE_BY * math.sqrt(arrivals), 0.0)
                rates[model] = arrivals / elapsed, sure / elapsed
                row = rows.take(model, now)
                rows.last_active[row] = now
        self._set_rates(last, rates)
        last.count_from(report, now)

    def _lose(self, gone: _Worker) -> None:
        self._set_rates(gone, {})
        self._leave(gone.newest.values())

    def _leave(self, models: Iterable[ModelReport]) -> None:
        """What a worker does not mention any more is not held there."""
        for report in models:
            row = self.rows.row.get(report.model)
            if row is not None:
                self.rows.unmeasure(row, report)

    def _set_rates(self, worker: _Worker, rates: dict[ModelId, tuple[float, float]]) -> None:
        rows = self.rows
        for model, (rate, sure) in worker.rates.items():
            row = rows.row.get(model)
            if row is not None:
                rows.rate[row] -= rate
                rows.sure[row] -= sure
        for model, (rate, sure) in rates.items():
            row = rows.row[model]
            rows.rate[row] += rate
            rows.sure[row] += sure
        worker.rates = rates

    def _look(self, depths: Mapping[ModelId, int], now: float) -> None:
        rows = self.rows
        rows.last_active[rows.held > 0] = now
        for model, ready in depths.items():
            if ready:
                self.touch(model, now)
        elapsed = 0.0 if self._at is None else max(now - self._at, 0.0)
        self._at = now
        # Sums of floats that come and go do not end at exactly 0.
        rows.rate[rows.rate < 1e-9] = 0.0
        rate = rows.rate
        rows.fast += (1 - math.exp(-elapsed / self._policy.fast_tau_s)) * (rate - rows.fast)
        np.maximum(rows.fast, rows.sure, out=rows.fast)
        rows.slow += (1 - math.exp(-elapsed / self._policy.slow_tau_s)) * (rate - rows.slow)
        over = (rate == 0.0) & (rows.slow < NEGLIGIBLE_RATE) & (rows.fast < NEGLIGIBLE_RATE)
        rows.fast[over] = 0.0
        rows.slow[over] = 0.0


def _last_used(model: ModelReport, report: Report, now: float) -> float:
    """On our clock. Both times are the worker's own, so clocks need not agree."""
    return now - max(report.at - model.last_used, 0.0) if model.last_used else now
