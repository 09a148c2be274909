"""Tells how many workers the fleet should have; what acts on it is an adapter outside: local
processes, compose, or KEDA's metrics-api scaler on `GET /fleet/workers-wanted` (docs/scaling.md).
"""

from __future__ import annotations

from typing import get_args

import structlog

from services.placer.core.wanted import Cause, Wanted
from services.placer.metrics import Metrics

log = structlog.get_logger(__name__)


class Scale:
    """The number last published. It survives a change of the lease's term."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.known = False
        """Whether any number was published: until then nobody should act on it."""
        self.wanted = Wanted()

    def publish(self, wanted: Wanted, present: int, *, certain: bool) -> None:
        """`certain`: all workers that are alive have had the time to report. Until then only
        growth is told, since a fleet of which half is unseen must not be made smaller."""
        if not certain and wanted.workers <= present:
            return
        if wanted.workers != self.wanted.workers or not self.known:
            log.info("workers_wanted", workers=wanted.workers, reasons=list(wanted.reasons))
        self.known = True
        self.wanted = wanted
        self._metrics.workers_wanted.set(wanted.workers)
        for cause in get_args(Cause):
            self._metrics.workers_wanted_reason.labels(cause).set(cause in wanted.causes)
