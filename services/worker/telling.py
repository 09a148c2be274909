"""What the worker says of itself: the core's view, the device's, and the wall clock's."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from services.worker import wire
from services.worker.core.window import Window
from services.worker.core.worker import WorkerCore
from services.worker.devices import Meter
from services.worker.metrics import Metrics, Waiting
from shared.control import ModelReport, Report
from shared.names import ModelId


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
        self.host_budget_bytes = 0
        self.labels: dict[str, str] = {}
        """As configured; what every worker has is added."""
        self.memory: Callable[[], wire.MemoryMeasured | None] = lambda: None
        """What the engine last said of its memory."""
        self.window: Callable[[ModelId], Window | None] = lambda _: None
        """Of a model's messages."""
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
        told = self.memory() if state.engine_up else None
        measured = self.meter.models_bytes(told) if self.meter and state.engine_up else 0
        models = core.reports()
        self._count(models, used, measured, told)
        self._metrics.seen(models, self._waiting())
        wall, now = time.time(), time.monotonic()
        kind = self.started.device_kind if self.started else ""
        own = {"worker": self._worker, "host": socket.gethostname(), "device_kind": kind}
        return Report(
            worker=self._worker,
            incarnation=self._incarnation,
            seq=self._seq,
            at=wall,
            device_kind=kind,
            device_name=self.started.device_name if self.started else "",
            budget_bytes=self.budget_bytes,
            used_bytes=used,
            measured_bytes=measured,
            host_budget_bytes=self.host_budget_bytes,
            host_used_bytes=state.host.used_bytes(),
            generation=core.generation,
            fence=core.fence,
            draining=core.draining,
            engine_up=state.engine_up,
            engine_restarts=core.engine_restarts,
            labels=self.labels | own,
            models=tuple(self._told(model, wall - now) for model in models),
        )

    def _count(
        self,
        models: tuple[ModelReport, ...],
        used: int,
        measured: int,
        told: wire.MemoryMeasured | None,
    ) -> None:
        metrics, state = self._metrics, self._core.state
        metrics.device(self.budget_bytes, used, measured)
        metrics.host_budget_bytes.set(self.host_budget_bytes)
        metrics.host_used_bytes.set(state.host.used_bytes())
        metrics.host_measured_bytes.set(told.host_bytes if told else 0)
        metrics.spare_bytes.set(told.spare_bytes if told else 0)
        for tier, room in (("device", state.device), ("host", state.host)):
            metrics.shared_bytes.labels(tier).set(room.shared_bytes())
            metrics.models.labels(tier).set(sum(model.tier == tier for model in models))
        metrics.models_ready.set(len(state.ready()))
        metrics.held_bytes.set(self._core.held_bytes)

    def _waiting(self) -> dict[ModelId, Waiting]:
        """By model, where anything waits for a batch."""
        dispatch, waiting = self._core.dispatch, {}
        for model in dispatch.models_waiting():
            entries = dispatch.waiting(model)
            waiting[model] = Waiting(len(entries), min(each.item.arrived for each in entries))
        return waiting

    def sent(self, report: Report) -> None:
        """The store has it."""
        if report.engine_up and self._on_ready is not None:
            ready, self._on_ready = self._on_ready, None
            ready(self._worker)

    def _told(self, model: ModelReport, offset_s: float) -> ModelReport:
        """The core counts monotonic seconds, others can only read Unix time; and it counts
        requests, where the broker counts messages."""
        told: dict[str, Any] = {}
        if model.last_used:
            told["last_used"] = model.last_used + offset_s
        window = self.window(model.model)
        if window is not None and model.bound:
            told["saturated"] = window.full(model.held)
            told["requests_per_message"] = window.mean
        return msgspec.structs.replace(model, **told) if told else model
