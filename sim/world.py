"""All that is simulated together: requests, broker, workers, reports and the placing.

Law: each request ends exactly once, whatever becomes of the workers (`Ledger`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shared.control import Assigned, Assignment, Report
from sim.agenda import Agenda
from sim.model import ENDINGS, Change, Decision, Floats, Ints, Placing, SimWorker, Workload
from sim.queues import Broker
from sim.repository import Profiles
from sim.settings import REPORTS_APART_S, STORE_HOP_S, Settings
from sim.workers import What, Worker

_OPEN = -1
_ANSWERED, _LATE, _REFUSED, _LOST = range(len(ENDINGS))
_FENCE = 1


class Ledger:
    """What becomes of each request."""

    def __init__(self, workload: Workload, settings: Settings) -> None:
        self.times: list[float] = workload.times.tolist()
        targets = np.array([model.manifest.target_ms / 1e3 for model in workload.models])
        patience = np.minimum(settings.timeout_s, settings.timeout_targets * targets)
        self.deadlines: list[float] = (workload.times + patience[workload.which]).tolist()
        self.left = len(self.times)
        """Requests that have not ended."""
        self.again = 0
        """Answers to what was answered before: a worker died before it could acknowledge."""
        self._latency = [float("nan")] * self.left
        self._ending = [_OPEN] * self.left

    def answered(self, request: int, at: float) -> None:
        if self._ending[request] != _OPEN:
            self.again += 1
        elif at > self.deadlines[request]:
            self._end(request, _LATE)
        else:
            self._end(request, _ANSWERED)
            self._latency[request] = at - self.times[request]

    def refused(self, request: int, code: str) -> None:
        if self._ending[request] == _OPEN:
            self._end(request, _LATE if code == "deadline_exceeded" else _REFUSED)

    def close(self, held: set[int]) -> tuple[Floats, Ints]:
        """At the end: what is still `held` somewhere is late, anything else was lost."""
        for request, ending in enumerate(self._ending):
            if ending == _OPEN:
                self._end(request, _LATE if request in held else _LOST)
        return np.array(self._latency), np.array(self._ending, np.int32)

    def _end(self, request: int, ending: int) -> None:
        self._ending[request] = ending
        self.left -= 1


class World:
    """Its parts, and what passes between them."""

    def __init__(self, workload: Workload, placing: Placing, settings: Settings, seed: int) -> None:
        self.agenda = Agenda()
        self.ledger = Ledger(workload, settings)
        self.broker = Broker([model.id for model in workload.models], self._expired)
        self.workers: dict[str, Worker] = {}
        """Those that live."""
        self.gone: list[Worker] = []
        self.changes: list[Change] = []
        self.fleet: list[tuple[float, int]] = []
        self.on_tick: Callable[[], None] = lambda: None
        self._workload = workload
        self._models = {model.id: model for model in workload.models}
        self._placing = placing
        self._prompt = bool(getattr(placing, "prompt", False))
        self._settings = settings
        self._random = np.random.default_rng(seed)
        self._profiles = Profiles()
        self._reports: dict[str, Report] = {}
        self._expires: dict[str, float] = {}
        self._generations: dict[str, int] = {}
        self._whys: dict[tuple[str, str], str] = {}
        self._ticked_at = float("-inf")
        self._tick_at = float("inf")
        self._incarnations = 0

    def __repr__(self) -> str:
        return f"<World {self.agenda} {self.broker} workers={list(self.workers)}>"

    def begin(self, workers: Sequence[SimWorker]) -> None:
        for worker in workers:
            self.add(worker)
        decision = self._placing.start(self._workload.models, workers)
        self.apply(decision)
        self._next_tick(0.0)

    # --- requests ---------------------------------------------------------------------------

    def arrive(self, request: int, which: int) -> None:
        queue = self.broker.queues[which]
        if not queue.consumers:
            decision = self._placing.unrouted(queue.model, self.agenda.now)
            if decision.assigned:
                self.apply(decision)
        self.broker.publish(queue, request)

    def deadline(self, request: int) -> float:
        return self.ledger.deadlines[request]

    def answered(self, request: int, at: float) -> None:
        self.ledger.answered(request, at)

    def refused(self, request: int, code: str) -> None:
        self.ledger.refused(request, code)

    def held(self) -> set[int]:
        """Requests that are somewhere."""
        held = {request for queue in self.broker.queues for request in queue.ready}
        for worker in self.workers.values():
            held.update(worker.holds())
        return held

    def _expired(self, request: int) -> bool:
        if self.ledger.deadlines[request] > self.agenda.now:
            return False
        self.ledger.refused(request, "deadline_exceeded")
        return True

    # --- the fleet --------------------------------------------------------------------------

    def add(self, spec: SimWorker) -> None:
        """A worker that has just started. Raises `ValueError` for a name that is taken."""
        if spec.name in self.workers:
            raise ValueError(f"there is a worker {spec.name} already")
        self._incarnations += 1
        if self._settings.profiled:
            self._profiles.measure(self._workload.models, spec)
        self.workers[spec.name] = Worker(
            spec,
            self._incarnations,
            self.agenda,
            self.broker,
            self._models,
            self._profiles,
            self,
            self._settings,
            self._random,
        )
        self.changed("worker_added", "", spec.name)
        self._count()

    def kill(self, name: str) -> None:
        """Its report stays until it expires; until then nobody knows."""
        worker = self.workers.pop(name)
        worker.kill()
        self._left(worker)

    def emptied(self, worker: Worker) -> None:
        """It says goodbye."""
        if self.workers.get(worker.name) is worker:
            del self.workers[worker.name]
            worker.kill()
            self._reports.pop(worker.name, None)
            self._left(worker)

    def _left(self, worker: Worker) -> None:
        self.gone.append(worker)
        self.changed("worker_removed", "", worker.name)
        self._count()

    def _count(self) -> None:
        self.fleet.append((self.agenda.now, len(self.workers)))

    # --- the placing ------------------------------------------------------------------------

    def reported(self, report: Report, *, news: bool) -> None:
        self._reports[report.worker] = report
        self._expires[report.worker] = self.agenda.now + self._settings.report_ttl_s
        if news and self._prompt:
            apart = self._ticked_at + REPORTS_APART_S
            self._next_tick(max(self.agenda.now + STORE_HOP_S, apart))

    def apply(self, decision: Decision) -> None:
        """Gives each assignment its generation and sends it."""
        for name, models in decision.assigned.items():
            generation = self._generations[name] = self._generations.get(name, 0) + 1
            assigned = tuple(Assigned(model) for model in models)
            assignment = Assignment(
                worker=name,
                fence=_FENCE,
                generation=generation,
                models=assigned,
                drain=name in decision.ended,
                shares=dict(decision.shares),
            )
            for model in models:
                self._whys.setdefault((model, name), decision.why)
            self.agenda.after(STORE_HOP_S, self._assign, assignment)

    def _assign(self, assignment: Assignment) -> None:
        worker = self.workers.get(assignment.worker)
        if worker is not None:
            worker.assigned(assignment)

    def _next_tick(self, at: float) -> None:
        if at < self._tick_at:
            self._tick_at = at
            self.agenda.at(at, self._tick)

    def _tick(self) -> None:
        now = self.agenda.now
        if now < self._tick_at:
            return  # it was brought forward
        self._ticked_at, self._tick_at = now, float("inf")
        reports = [each for name, each in self._reports.items() if self._expires[name] > now]
        if len(reports) < len(self._reports):
            self._reports = {report.worker: report for report in reports}
        self.apply(self._placing.decide(reports, self.broker.depths(), now))
        self.on_tick()
        self._next_tick(now + self._placing.tick_s + (REPORTS_APART_S if self._prompt else 0.0))

    # --- what is kept -----------------------------------------------------------------------

    def changed(self, what: What, model: str, worker: str) -> None:
        why = self._whys.pop((model, worker), "") if what == "bound" else ""
        self.changes.append(Change(self.agenda.now, what, model, worker, why))
