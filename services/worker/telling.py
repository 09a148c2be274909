"""What the worker says of itself: the core's view, the device's, and the wall clock's."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from services.worker import wire
from services.worker.core.worker import WorkerCore
from services.worker.devices import Meter
from services.worker.metrics import Metrics
from shared.control import ModelReport, Report


class Teller:
    """Makes the reports."""

    def __init__(
        self,
        core: WorkerCore,
        worker: str,
        incarnation: str,
        budget_bytes: int,
        metrics: Metrics,
        on_ready: Callable[[str], None] | None,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.meter: Meter | None = None
        self.started: wire.EngineStarted | None = None
        self._core = core
        self._worker = worker
        self._incarnation = incarnation
        self._metrics = metrics
        self._on_ready = on_ready
        self._seq = 0

    def report(self) -> Report:
        core, state = self._core, self._core.state
        self._seq += 1
        used = state.used_bytes()
        measured = self.meter.models_bytes() if self.meter and state.engine_up else 0
        self._metrics.memory(self.budget_bytes, used, measured)
        self._metrics.models_ready.set(sum(m.stage == "ready" for m in state.residents()))
        self._metrics.held_bytes.set(core.held_bytes)
        wall, now = time.time(), time.monotonic()
        return Report(
            worker=self._worker,
            incarnation=self._incarnation,
            seq=self._seq,
            at=wall,
            device_kind=self.started.device_kind if self.started else "",
            device_name=self.started.device_name if self.started else "",
            budget_bytes=self.budget_bytes,
            used_bytes=used,
            measured_bytes=measured,
            generation=core.generation,
            fence=core.fence,
            draining=core.draining,
            engine_up=state.engine_up,
            engine_restarts=core.engine_restarts,
            models=tuple(_on_the_wall(model, wall - now) for model in core.reports()),
        )

    def sent(self, report: Report) -> None:
        """The store has it."""
        if report.engine_up and self._on_ready is not None:
            ready, self._on_ready = self._on_ready, None
            ready(self._worker)


def _on_the_wall(model: ModelReport, offset_s: float) -> ModelReport:
    """The core counts monotonic seconds; others can only read Unix time."""
    if not model.last_used:
        return model
    return msgspec.structs.replace(model, last_used=model.last_used + offset_s)
