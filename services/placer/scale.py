"""Tells how many workers the fleet should have; what acts on it is an adapter outside (local
processes, compose, or KEDA's metrics-api scaler on `GET /scale`)."""

from __future__ import annotations

import structlog

from services.placer.core.wanted import Wanted
from services.placer.metrics import Metrics

log = structlog.get_logger(__name__)


class Scale:
    """The number last published. It survives a change of the lease's term."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.wanted = Wanted()

    def publish(self, wanted: Wanted) -> None:
        if wanted.workers != self.wanted.workers:
            log.info("workers_wanted", workers=wanted.workers, reasons=list(wanted.reasons))
        self.wanted = wanted
        self._metrics.workers_wanted.set(wanted.workers)
