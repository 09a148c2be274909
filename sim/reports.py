"""Heartbeats in virtual time: what services/worker/{report,telling}.py do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from services.worker.core.worker import WorkerCore
from shared.control import Report
from sim.agenda import Agenda
from sim.model import SimWorker
from sim.settings import REPORTS_APART_S


class Reporter:
    """Reports at intervals, and at once when there is news, but for `REPORTS_APART_S`."""

    def __init__(
        self,
        agenda: Agenda,
        core: WorkerCore,
        spec: SimWorker,
        incarnation: str,
        interval_s: float,
        random: np.random.Generator,
        measured_bytes: Callable[[], int | None],
        send: Callable[[Report, bool], None],
    ) -> None:
        """`measured_bytes`: what the models take by the device's own word, asked before each
        report is made; None when the worker is gone. `send` takes a report, and whether it is
        news."""
        self._agenda = agenda
        self._core = core
        self._spec = spec
        self._incarnation = incarnation
        self._interval_s = interval_s
        self._random = random
        self._measured_bytes = measured_bytes
        self._send = send
        self._news = self._ended = False
        self._seq = 0
        self._sent_at = float("-inf")
        self._next_at = float("inf")
        self._labels = spec.reported_labels()

    def __repr__(self) -> str:
        return f"<Reporter {self._spec.name} seq={self._seq}>"

    def news(self) -> None:
        self._news = True
        self._at(max(self._agenda.now, self._sent_at + REPORTS_APART_S))

    def end(self) -> None:
        """Nothing more is said."""
        self._ended = True

    def _at(self, when: float) -> None:
        if when < self._next_at:
            self._next_at = when
            self._agenda.at(when, self._report)

    def _report(self) -> None:
        now = self._agenda.now
        if now < self._next_at or self._ended:
            return  # an earlier one was asked for since, and sent
        news, self._news = self._news, False
        self._sent_at, self._next_at = now, float("inf")
        measured_bytes = self._measured_bytes()
        if measured_bytes is None:
            return
        self._send(self._make(measured_bytes), news)
        interval_s = self._interval_s
        if self._seq == 1:  # the heartbeats of workers that start together are not in step
            interval_s *= float(self._random.uniform())
        self._at(now + REPORTS_APART_S + interval_s)

    def _make(self, measured_bytes: int) -> Report:
        core, state, spec = self._core, self._core.state, self._spec
        self._seq += 1
        return Report(
            worker=spec.name,
            incarnation=self._incarnation,
            seq=self._seq,
            at=self._agenda.now,
            device_kind=spec.device_kind,
            device_name="simulated",
            budget_bytes=spec.budget_bytes,
            used_bytes=state.used_bytes(),
            measured_bytes=measured_bytes,
            host_budget_bytes=spec.host_bytes,
            host_used_bytes=state.host.used_bytes(),
            generation=core.generation,
            fence=core.fence,
            draining=core.draining,
            engine_up=state.engine_up,
            engine_restarts=core.engine_restarts,
            labels=self._labels,
            models=core.reports(),
        )
