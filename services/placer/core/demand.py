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

from services.placer.core.columns import Floats, Ints
from services.placer.core.heard import (
    ARRIVED,
    HELD,
    LOAD_SECONDS,
    SECONDS,
    Heard,
    Look,
    last_used,
)
from services.placer.core.news import News
from services.placer.core.policy import Policy
from services.placer.core.tracked import Tracked
from services.placer.core.view import Demand
from shared.control import Report
from shared.names import ModelId

_SURE_BY = 2.0
"""Standard deviations of a Poisson count, each of which is its root: a count is above its mean by
more than these in 1 of 40 intervals."""
NEGLIGIBLE_RATE = 1e-4
"""Requests per second below which a model's averages are forgotten."""


class DemandTracker:
    """Follows the demand of all models that any worker mentions.

    Laws: rates are never negative; a model's `last_active` never goes back while it is kept.
    """

    def __init__(self, policy: Policy) -> None:
        self.rows = Tracked()
        self._policy = policy
        self._workers: dict[str, Heard] = {}
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
            worker.forget(model)

    def observe(
        self, reports: Iterable[Report], depths: Mapping[ModelId, int], now: float
    ) -> dict[str, News]:
        """Takes in the newest report of every worker, and the depths that were asked for.
        Returns what is new in those reports that are, by worker."""
        present, fresh = set(), list[tuple[Heard, Report]]()
        for report in reports:
            present.add(report.worker)
            heard = self._workers.get(report.worker)
            if heard is None:
                heard = self._workers[report.worker] = Heard(report, now)
            if heard.report is not report:
                fresh.append((heard, report))
        news = self._take(Look(fresh, self.rows, now), now) if fresh else {}
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
        known.follow(self.rows)
        known.measure()
        mean = float(self.rows.seconds[known.measured].sum())
        return known.own / mean if mean > 0 else 1.0

    # --- parts ------------------------------------------------------------------------------

    def _take(self, look: Look, now: float) -> dict[str, News]:
        """Reports that are new: arrivals first, then what is so now."""
        if any(look.elapsed):
            self._count(look, now)
        self._measure(look)
        return look.news()

    def _count(self, look: Look, now: float) -> None:
        """What has arrived since it was last counted, by worker, and is so many a second."""
        rows = self.rows
        elapsed, now_arrived = np.array(look.elapsed)[look.number], look.now[ARRIVED]
        some = np.flatnonzero((elapsed > 0) & (look.base != now_arrived))
        row, base, arrived = look.rows[some], look.base[some], now_arrived[some]
        # A new baseline. What the worker has in hand came since it last reported; what
        # it has answered may be history, and one report too few does no harm.
        new = np.isnan(base)
        counted = np.where(arrived > base, arrived - base, arrived)
        counted[new] = np.minimum(look.now[HELD][some], arrived)[new]
        for n, at in zip(some[new].tolist(), row[new].tolist(), strict=True):
            heard, report = look.fresh[look.number[n]]
            model = rows.ids[at]
            assert model is not None, "a row that a model has"
            used = last_used(heard.models[model], report, now)
            rows.last_active[at] = max(rows.last_active[at], used)
        rows.last_active[row[counted > 0]] = now
        rates = np.zeros((2, len(elapsed)))
        rates[0, some] = counted / elapsed[some]
        # What of that is no chance.
        rates[1, some] = np.maximum(counted - _SURE_BY * np.sqrt(counted), 0.0) / elapsed[some]
        # In place of what each worker counted before, one after another: what a sum of floats is
        # depends on the order.
        at, changes, less = list[Ints](), list[Floats](), -rates
        for (heard, start, end), seconds in zip(look.parts(), look.elapsed, strict=True):
            if seconds and heard.report is not None:
                before, lost = heard.counted(rows)
                at += (before, heard.rows)
                changes += (lost, rates[:, start:end])
                heard.count(heard.report, less[:, start:end], now_arrived[start:end], rows, now)
        rated, (rate, sure) = np.concatenate(at), np.concatenate(changes, axis=1)
        np.add.at(rows.rate, rated, rate)
        np.add.at(rows.sure, rated, sure)

    def _measure(self, look: Look) -> None:
        """What workers say of models now, in place of what they said before."""
        rows, row = self.rows, look.rows
        differs = (look.was[:ARRIVED] != look.now[:ARRIVED]).any(axis=0)
        if not (look.gone or differs.any()):
            return
        rows.hold(row, look.now[HELD] - look.was[HELD])
        np.maximum.at(rows.load_seconds, row, look.now[LOAD_SECONDS])
        before, seconds = look.was[SECONDS], look.now[SECONDS]
        # Whoever says something else is taken out of the sums and put in again, time or not.
        differs &= (before > 0) | (seconds > 0)
        # What a worker measures for the first time, or does not any more, is looked at one by
        # one, with all others that say something of the same model: which word was the last
        # that stands depends on the order.
        once = differs & ~((before > 0) & (seconds > 0) & rows.is_timed(row))
        apart = np.zeros(len(rows.ids), bool)
        apart[row[once]] = True
        gone = [
            (number, at, each)
            for number, models in look.gone.items()
            for each in models
            if (at := rows.row.get(each.model)) is not None
        ]
        left: Ints = np.array([at for _, at, _ in gone], np.int64)
        apart[left] = True
        rows.hold(left, np.array([-each.held for *_, each in gone], float))
        alike = differs & ~apart[row]
        rows.times(row[alike], before[alike], seconds[alike])
        rest = [
            (int(look.number[n]), 0, int(row[n]), float(before[n]), float(seconds[n]))
            for n in np.flatnonzero(differs & apart[row]).tolist()
        ]
        rest += [(number, 1, at, each.seconds_per_item, 0.0) for number, at, each in gone]
        for _, _, at, was, now in sorted(rest):
            rows.time(at, was, now)

    def _lose(self, gone: Heard) -> None:
        gone.follow(self.rows)
        counted, (rate, sure) = gone.counted(self.rows)
        np.add.at(self.rows.rate, counted, rate)
        np.add.at(self.rows.sure, counted, sure)
        # What a worker does not mention any more is not held there.
        rows, (held, seconds, *_) = self.rows, gone.numbers
        rows.hold(gone.rows, -held)
        for row, was in zip(gone.rows.tolist(), seconds.tolist(), strict=True):
            rows.time(row, was, 0.0)

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
