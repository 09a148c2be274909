"""How much of the fleet each model asks for, from counters in reports and depths of queues.

Arrivals are counted per incarnation of a worker: a counter that starts again is no negative
arrival, and what a worker counted before this placer first saw it is history, not a spike. The
same holds for each model: a worker leaves idle ones out and may bring them back, with its old
counter or with a new one.
Rates are moving averages over time, not over ticks, so that they mean the same at any tick.

Backlog is to be worked off within half the model's latency target. A backlog that is gone
before another copy could be loaded is no reason for one, so the time to load counts as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from services.placer.core.policy import Policy
from services.placer.core.view import Demand
from shared.control import ModelReport, Report
from shared.names import ModelId

SHORTEST_INTERVAL_S = 0.05
"""Two reports closer than this are taken as one: a rate over less is noise."""
NEGLIGIBLE_RATE = 1e-4
"""Requests per second below which a model's averages are forgotten."""


class _Worker:
    """The last report that was counted of one worker."""

    __slots__ = ("arrived", "at", "incarnation", "rates", "seen", "seq")

    def __init__(self, report: Report, now: float) -> None:
        self.incarnation = report.incarnation
        self.seq = report.seq
        self.at = report.at
        self.seen = now
        self.arrived = {model.model: model.arrived for model in report.models}
        self.rates: dict[ModelId, float] = {}


class _Model:
    """What is kept of one model between two looks."""

    __slots__ = ("fast", "held", "last_active", "load_seconds", "seconds_per_item", "slow")

    def __init__(self, last_active: float) -> None:
        self.fast = 0.0
        self.slow = 0.0
        self.held = 0
        self.last_active = last_active
        self.seconds_per_item = 0.0
        self.load_seconds = 0.0


class DemandTracker:
    """Follows the demand of all models that any worker mentions.

    Laws: rates are never negative; a model's `last_active` never goes back while it is kept.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._workers: dict[str, _Worker] = {}
        self._models: dict[ModelId, _Model] = {}
        self._at: float | None = None

    def touch(self, model: ModelId, now: float) -> None:
        """Something was asked of the model that no worker has counted (yet)."""
        self._kept(model, now).last_active = now

    def forget(self, model: ModelId) -> None:
        self._models.pop(model, None)

    def observe(self, reports: Iterable[Report], depths: Mapping[ModelId, int], now: float) -> None:
        """Takes in the newest report of every worker, and the depths that were asked for."""
        reports = list(reports)
        for report in reports:
            self._count(report, now)
        present = {report.worker for report in reports}
        for gone in self._workers.keys() - present:
            del self._workers[gone]
        self._measure(reports, depths, now)
        self._average(now)

    def demand(self, model: ModelId, ready: int, target_s: float, now: float) -> Demand:
        """What is asked of the model now. `ready`: messages in its queue."""
        kept = self._models.get(model)
        if kept is None:
            return Demand(ready=ready, last_active=now)
        backlog = ready + kept.held
        horizon = max(0.5 * target_s, self._policy.shortest_horizon_s, kept.load_seconds)
        # Without a measurement there is no telling what a second copy would bring.
        seconds = kept.seconds_per_item
        return Demand(
            rate_fast=kept.fast,
            rate_slow=kept.slow,
            seconds_per_item=seconds,
            ready=ready,
            held=kept.held,
            need=seconds * (max(kept.fast, kept.slow) + backlog / horizon),
            last_active=kept.last_active,
        )

    def load_seconds(self, model: ModelId) -> float:
        """The longest load time reported of the model; 0 when none was."""
        kept = self._models.get(model)
        return 0.0 if kept is None else kept.load_seconds

    def _kept(self, model: ModelId, now: float) -> _Model:
        kept = self._models.get(model)
        if kept is None:
            kept = self._models[model] = _Model(now)
        return kept

    def _count(self, report: Report, now: float) -> None:
        last = self._workers.get(report.worker)
        if last is None:
            self._workers[report.worker] = _Worker(report, now)
            for model in report.models:
                if model.model not in self._models:
                    self._models[model.model] = _Model(_last_used(model, report, now))
            return
        restarted = last.incarnation != report.incarnation
        if not restarted and report.seq == last.seq:
            return
        elapsed = now - last.seen if restarted else report.at - last.at
        if elapsed < 0:
            elapsed = now - last.seen
        if elapsed < SHORTEST_INTERVAL_S:
            return
        counted = _Worker(report, now)
        for model in report.models:
            if restarted or model.model in last.arrived:
                before = 0 if restarted else last.arrived[model.model]
                arrivals = model.arrived - before if model.arrived >= before else model.arrived
            else:
                # A new baseline. What the worker has in hand came since it last reported; what
                # it has answered may be history, and one report too few does no harm.
                arrivals = min(model.held, model.arrived)
                used = _last_used(model, report, now)
                kept = self._kept(model.model, used)
                kept.last_active = max(kept.last_active, used)
            if arrivals:
                counted.rates[model.model] = arrivals / elapsed
                self._kept(model.model, now).last_active = now
        self._workers[report.worker] = counted

    def _measure(
        self, reports: Iterable[Report], depths: Mapping[ModelId, int], now: float
    ) -> None:
        for kept in self._models.values():
            kept.held = 0
        seconds: dict[ModelId, list[float]] = {}
        for report in reports:
            for model in report.models:
                kept = self._kept(model.model, now)
                if model.held:
                    kept.held += model.held
                    kept.last_active = now
                if model.seconds_per_item > 0:
                    seconds.setdefault(model.model, []).append(model.seconds_per_item)
                kept.load_seconds = max(kept.load_seconds, model.load_seconds)
        for name, values in seconds.items():
            self._models[name].seconds_per_item = sum(values) / len(values)
        for name, ready in depths.items():
            if ready:
                self._kept(name, now).last_active = now

    def _average(self, now: float) -> None:
        elapsed = 0.0 if self._at is None else max(now - self._at, 0.0)
        self._at = now
        fast = 1 - math.exp(-elapsed / self._policy.fast_tau_s)
        slow = 1 - math.exp(-elapsed / self._policy.slow_tau_s)
        rates: dict[ModelId, float] = {}
        for worker in self._workers.values():
            for name, rate in worker.rates.items():
                rates[name] = rates.get(name, 0.0) + rate
        for name, kept in self._models.items():
            rate = rates.get(name, 0.0)
            if not rate and kept.slow < NEGLIGIBLE_RATE and kept.fast < NEGLIGIBLE_RATE:
                kept.fast = kept.slow = 0.0
                continue
            kept.fast += fast * (rate - kept.fast)
            kept.slow += slow * (rate - kept.slow)


def _last_used(model: ModelReport, report: Report, now: float) -> float:
    """On our clock. Both times are the worker's own, so clocks need not agree."""
    return now - max(report.at - model.last_used, 0.0) if model.last_used else now
