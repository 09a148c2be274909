"""What this placer knows and wants, in one place and without awaits.

`assigned` is what it wants; what was written to the store and to the broker follows it
(apply.py). Laws: `assigned` has exactly the workers that report; every assigned model is
active; a model is active or being retired, never both.

Times are monotonic, but for `Event.at`, which people read.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from services.placer.core.changes import Considered, Plan, Retire
from services.placer.core.columns import Models
from services.placer.core.demand import DemandTracker
from services.placer.core.news import News, header, shown
from services.placer.core.policy import Policy
from services.placer.core.rooms import Room
from services.placer.core.view import Binding, FleetSince, Pace, View, WorkerView
from services.placer.failures import Failures
from services.placer.picture import Active, Picture
from shared.control import ModelReport, Report
from shared.models import Manifest
from shared.names import ModelId, split_model_id

__all__ = ["Active", "Event", "Knowledge", "Placed", "Retiring"]

EVENTS_KEPT = 1000
_NEGLIGIBLE_S = 1e-3
"""Seconds of loading that are not worth to be remembered."""


class Event(msgspec.Struct, frozen=True):
    """One thing that happened, for people."""

    at: float
    what: str
    model: str = ""
    worker: str = ""
    why: str = ""


class Retiring(msgspec.Struct, frozen=True):
    """A model whose queue is to go."""

    gone: Retire
    active: Active
    """What was known of it, should it be asked again meanwhile."""


class Placed(msgspec.Struct, frozen=True):
    """A model's last placement: where, why there, and which workers were considered."""

    at: float
    worker: str
    why: str
    considered: tuple[Considered, ...] = ()


class Knowledge:
    """See the module's text. For one event loop, and one term of the lease."""

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.monotonic) -> None:
        self.policy = policy
        self.clock = clock
        self.tracker = DemandTracker(policy)
        self.reports: dict[str, Report] = {}
        self.reported: dict[str, dict[ModelId, ModelReport]] = {}
        self.assigned: dict[str, dict[ModelId, Binding]] = {}
        self.active: dict[ModelId, Active] = {}
        self.retiring: dict[ModelId, Retiring] = {}
        self.consumers: dict[ModelId, list[str]] = {}
        """Workers that consume each model's queue, as they report."""
        self.defaults: dict[str, int] = {}
        """Highest registered version by name, of active models."""
        self.generations: dict[str, int] = {}
        """Generation of the assignment last written, by worker."""
        self.leaving: set[str] = set()
        """Workers that were asked to leave, of those that report."""
        self._full: dict[str, set[ModelId]] = {}
        self._waiting: set[ModelId] = set()
        """Active models of which something may wait in the queue."""
        self.version = 0
        """Grows with everything that another view would show."""
        self.saturated: set[ModelId] = set()
        """Models of which some worker has taken all that it may at once."""
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.last_plan = Plan()
        self._copies: dict[ModelId, int] = {}
        self.placed: dict[ModelId, Placed] = {}
        """The last placement of each active model that this placer has placed."""
        self._picture = Picture(self.tracker, policy)
        self._failures = Failures(policy)
        self._copied: dict[str, tuple[float, float]] = {}
        """Seconds of loading given to a worker, decaying, as of when."""
        self._views: dict[str, WorkerView] = {}
        """As last made, of workers of which nothing has changed since."""
        self._rooms: dict[str, Room] = {}
        """Likewise, of workers where neither sizes nor the assignment have changed."""
        self._shares: dict[str, bool] = {}
        self._measured: set[ModelId] = set()
        """Models of which a size was learnt."""
        self._low_since: dict[ModelId, float] = {}
        self._fleet_since = FleetSince()
        self._pace = Pace()

    def __repr__(self) -> str:
        return (
            f"<Knowledge workers={len(self.reports)} active={len(self.active)} "
            f"retiring={len(self.retiring)}>"
        )

    def note(self, what: str, model: str = "", worker: str = "", why: str = "") -> None:
        self.events.append(Event(time.time(), what, model, worker, why))

    # --- what is seen -----------------------------------------------------------------------

    def see(self, reports: Iterable[Report], depths: dict[ModelId, int], asked_at: float) -> None:
        """The newest report of every worker that is there, and the depths that were asked for
        at `asked_at` or later. A worker without a report is gone; a new one must have been
        adopted before."""
        now = self.clock()
        before, self.reports = self.reports, {report.worker: report for report in reports}
        for gone in before.keys() - self.reports.keys():
            self._lose(gone)
        news = self.tracker.observe(self.reports.values(), {}, now)
        for worker in self._failures.workers():
            if worker not in news:
                self._note_failures(self.reports[worker], now)
        for worker, new in news.items():
            self._take(self.reports[worker], before.get(worker), new, now)
        self._resized(self._measured)
        self._measured = set()
        self.see_depths(depths, asked_at)
        for model in self._waiting & self.consumers.keys():
            active = self.active.get(model)
            if active is not None:
                active.waiting_at = None
        self.saturated = {model for models in self._full.values() for model in models}
        self.version += 1

    def see_depths(self, depths: dict[ModelId, int], asked_at: float) -> None:
        """What waits in these models' queues, as asked for at `asked_at` or later."""
        now = self.clock()
        self.version += 1
        for model, depth in depths.items():
            active = self.active.get(model)
            if active is None:
                continue
            active.depth = depth
            if depth:
                self._waiting.add(model)
                self.tracker.touch(model, now)
                if active.backlog_since is None:
                    active.backlog_since = asked_at
                continue
            active.backlog_since = None
            if active.waiting_at is not None and active.waiting_at < asked_at:
                active.waiting_at = None

    def adopt(
        self, worker: str, models: dict[ModelId, str], generation: int, *, leaving: bool = False
    ) -> None:
        """Takes what stands for a worker that was not known: its stored assignment, or what
        it has bound. Models that are not active must be activated before."""
        now = self.clock()
        self.assigned[worker] = {}
        if leaving:
            self.leaving.add(worker)
            self._views.pop(worker, None)
        for model, reason in models.items():
            if model in self.active:
                self._put(worker, model, Binding(now, reason))
        self.generations[worker] = generation
        self.note("worker joined", worker=worker)

    def copies(self, model: ModelId) -> int:
        """Workers to which the model is assigned."""
        return self._copies.get(model, 0)

    def bindings(self) -> list[tuple[str, int]]:
        """Active models, and to how many workers each is assigned."""
        return [(model, self.copies(model)) for model in list(self.active)]

    def in_hand(self, model: ModelId) -> list[str]:
        """Workers that may hold messages of the model's queue: that consume it, that hold some,
        or that have not been seen to follow their last assignment."""
        found = []
        for worker, report in self.reports.items():
            seen = self.reported[worker].get(model)
            behind = report.generation < self.generations.get(worker, 0)
            if behind or (seen is not None and (seen.bound or seen.held)):
                found.append(worker)
        return found

    def device_kinds(self) -> set[str]:
        return {report.device_kind for report in self.reports.values() if report.device_kind}

    # --- who leaves -------------------------------------------------------------------------

    def leave(self, worker: str, why: str) -> None:
        """The worker, which must report, is to leave once others have what it has."""
        if worker not in self.leaving:
            self.leaving.add(worker)
            self._views.pop(worker, None)
            self.note("worker leaves", worker=worker, why=why)

    def stay(self, worker: str) -> None:
        """Takes that back."""
        if worker in self.leaving:
            self.leaving.remove(worker)
            self._views.pop(worker, None)
            self.note("worker stays", worker=worker)

    # --- what is active ---------------------------------------------------------------------

    def activate(self, model: ModelId, manifest: Manifest | None, *, why: str) -> Active:
        """Makes the model active, or returns what it is already."""
        active = self.active.get(model)
        if active is None:
            retiring = self.retiring.pop(model, None)
            active = self.active[model] = Active(manifest) if retiring is None else retiring.active
            self._waiting.add(model)
            self.version += 1
            self.tracker.touch(model, self.clock())
            self.note("activated", model, why=why)
        if active.manifest is None:
            active.manifest = manifest
        return active

    def wait(self, model: ModelId) -> None:
        """A request was put into the model's queue."""
        active = self.active.get(model)
        if active is not None:
            now = self.clock()
            self.tracker.touch(model, now)
            self.version += 1
            if model not in self.consumers:
                active.waiting_at = now
                self._waiting.add(model)

    def retire(self, gone: Retire) -> None:
        """Takes the model from all workers and out of what is active."""
        for worker in self.assigned if self.copies(gone.model) else ():
            self._drop(worker, gone.model)
        active = self.active.pop(gone.model, None)
        if active is not None:
            self.version += 1
            active.waiting_at = None
            active.base = None  # its row goes: should it come back, it is new to the picture
            self.retiring[gone.model] = Retiring(gone, active)
            self._low_since.pop(gone.model, None)
            self.placed.pop(gone.model, None)
            self.note("retired", gone.model, why=gone.reason)

    def forget(self, model: ModelId) -> None:
        """The model's queue is gone."""
        self.retiring.pop(model, None)
        if model not in self.active:
            self.tracker.forget(model)

    def is_default(self, model: ModelId) -> bool:
        name, version = split_model_id(model)
        return self.defaults.get(name) == version

    # --- what is decided --------------------------------------------------------------------

    def view(self, newcomer: tuple[ModelId, Active] | None = None) -> View:
        """A snapshot to decide on; with `newcomer` as if that were active. Costs what changed,
        and a few operations on whole columns."""
        now = self.clock()
        warm = {model: self.is_default(model) for model in self._picture.warm}
        self._resized(set(self._picture.refresh(self.active, warm, now)))
        if newcomer is None or newcomer[0] in self.active:
            models = self._picture.models(self._asked(), self._low_since)
        else:
            models = self._picture.models_with(*newcomer, self._asked(), self._low_since, now)
        workers = {}
        for worker, report in self.reports.items():
            seen = self._views.get(worker)
            if seen is None:
                seen = self._worker_view(worker, report, models, now)
                if not self._failures.engine_down(worker):
                    self._views[worker] = seen
            if worker in self._copied:
                seen = msgspec.structs.replace(seen, copied_s=self._copied_s(worker, now))
            workers[worker] = seen
        return View(
            at=now,
            workers=workers,
            models=models,
            fleet_since=self._fleet_since,
            pace=self._pace,
        )

    def commit(self, plan: Plan) -> set[str]:
        """Makes the plan's changes what is wanted. Returns the workers concerned."""
        now = self.clock()
        touched = set()
        for gone in plan.unbind:
            if self._drop(gone.worker, gone.model):
                touched.add(gone.worker)
                self.note("unassigned", gone.model, gone.worker, gone.reason)
        for new in plan.bind:
            if new.worker in self.assigned and new.model in self.active:
                self._put(new.worker, new.model, Binding(now, new.reason, new.spare))
                self.placed[new.model] = Placed(time.time(), new.worker, new.reason, new.considered)
                if new.load_s:
                    copied = self._copied_s(new.worker, now) + new.load_s
                    self._copied[new.worker] = (copied, now)
                touched.add(new.worker)
                self.note("assigned", new.model, new.worker, new.reason)
        for retired in plan.retire:
            self.retire(retired)
        return touched

    def remember(self, plan: Plan) -> None:
        """Keeps what the next planning needs of this one, and its explanations."""
        refused_before = {(no.model, no.refusal.reason) for no in self.last_plan.refused}
        for no in plan.refused:
            if (no.model, no.refusal.reason) not in refused_before:
                self.note("refused", no.model, why=str(no.refusal))
        if plan.wanted.workers != self.last_plan.wanted.workers:
            why = "; ".join(plan.wanted.reasons)
            self.note(f"{plan.wanted.workers} workers wanted", why=why)
        self.last_plan = plan
        self._low_since = dict(plan.low_since)
        self._fleet_since = plan.fleet_since
        self._pace = plan.pace

    # --- parts ------------------------------------------------------------------------------

    def _asked(self) -> dict[ModelId, Active]:
        """Models of which something waits in the queue, as far as is known."""
        for model in list(self._waiting):
            active = self.active.get(model)
            if active is None or not (active.depth or active.waiting_at is not None):
                self._waiting.remove(model)
        return {model: self.active[model] for model in self._waiting}

    def _put(self, worker: str, model: ModelId, binding: Binding) -> None:
        models = self.assigned[worker]
        if model not in models:
            self._copies[model] = self._copies.get(model, 0) + 1
        models[model] = binding
        self.version += 1
        self._views.pop(worker, None)
        self._rooms.pop(worker, None)

    def _drop(self, worker: str, model: ModelId) -> bool:
        if self.assigned.get(worker, {}).pop(model, None) is None:
            return False
        self.version += 1
        self._views.pop(worker, None)
        self._rooms.pop(worker, None)
        self._copies[model] -= 1
        if not self._copies[model]:
            del self._copies[model]
        return True

    def _take(self, report: Report, before: Report | None, news: News, now: float) -> None:
        """A report that is new."""
        worker = report.worker
        self.reported[worker] = news.models
        resized, seen = bool(news.gone), before is None or header(before) != header(report)
        full = self._full.get(worker, set[ModelId]())
        for was, told in news.changed:
            if was is None or was.bound != told.bound:
                self._note_bound(worker, told.model, bound=told.bound)
            if was is None or was.footprint != told.footprint:
                resized = True
                self._learn_size(report, told)
            if told.bound and told.saturated:
                full.add(told.model)
            else:
                full.discard(told.model)
            if not seen:
                seen = was is None or shown(was) != shown(told)
        for was in news.gone:
            self._note_bound(worker, was.model, bound=False)
            full.discard(was.model)
        if full:
            self._full[worker] = full
        else:
            self._full.pop(worker, None)
        self._note_failures(report, now)
        if resized:
            self._rooms.pop(worker, None)
            self._shares.pop(worker, None)
        if resized or seen:
            self._views.pop(worker, None)

    def _note_bound(self, worker: str, model: ModelId, *, bound: bool) -> None:
        consumers = self.consumers.setdefault(model, [])
        if bound and worker not in consumers:
            consumers.append(worker)
        elif not bound and worker in consumers:
            consumers.remove(worker)
        if not consumers:
            del self.consumers[model]

    def _lose(self, worker: str) -> None:
        for model in list(self.assigned.get(worker, ())):
            self._drop(worker, model)
        for model in self.reported.pop(worker, {}):
            self._note_bound(worker, model, bound=False)
        self.assigned.pop(worker, None)
        self.generations.pop(worker, None)
        for kept in (self._copied, self._views, self._rooms,
                     self._shares, self._full):  # fmt: skip
            kept.pop(worker, None)
        self._failures.forget(worker)
        self.leaving.discard(worker)
        self.note("worker left", worker=worker, why="no report any more")

    def _note_failures(self, report: Report, now: float) -> None:
        worker = report.worker
        wanted, generation = self.assigned.get(worker, {}), self.generations.get(worker, 0)
        if self._failures.note(report, wanted, generation, now):
            self._views.pop(worker, None)

    def _learn_size(self, report: Report, told: ModelReport) -> None:
        """What one worker measured holds for others of its kind, also after it is gone."""
        active = self.active.get(told.model)
        if active is None or not told.footprint.measured:
            return
        kind = report.device_kind
        if active.known.get(kind) != told.footprint:
            active.known[kind] = told.footprint
            self._measured.add(told.model)

    def _resized(self, changed: set[ModelId]) -> None:
        """These models may take another room than was thought, wherever they are."""
        for worker, models in self.reported.items() if changed else ():
            assigned = self.assigned.get(worker, {})
            if not (changed.isdisjoint(models) and changed.isdisjoint(assigned)):
                for kept in (self._views, self._rooms, self._shares):
                    kept.pop(worker, None)

    def _sharing(self, worker: str) -> bool:
        """A worker that has models with common parts, and shares none, is not set to share."""
        known = self._shares.get(worker)
        if known is None:
            known = self._shares[worker] = self._seems_to_share(worker)
        return known

    def _seems_to_share(self, worker: str) -> bool:
        apart = False
        for model, report in self.reported.get(worker, {}).items():
            if report.footprint.shares:
                return True
            active = self.active.get(model)
            common = active is not None and active.estimate is not None and active.estimate.shares
            apart = apart or bool(common and report.footprint.weights_bytes)
        return not apart

    def _copied_s(self, worker: str, now: float) -> float:
        seconds, at = self._copied.get(worker, (0.0, now))
        left = seconds * math.exp(-(now - at) / self.policy.load_window_s)
        if left < _NEGLIGIBLE_S:
            self._copied.pop(worker, None)
            return 0.0
        return left

    def _worker_view(self, worker: str, report: Report, models: Models, now: float) -> WorkerView:
        down_long = self._failures.engine_down_long(worker, now)
        leaving = worker in self.leaving
        reported = self.reported.get(worker, {})
        room = self._rooms.get(worker)
        if room is not None:
            room.follow(reported)  # it tells the same sizes, or the room would be gone
        seen = WorkerView(
            worker=worker,
            device_kind=report.device_kind,
            budget_bytes=report.budget_bytes if report.engine_up else 0,
            host_bytes=report.host_budget_bytes if report.engine_up else 0,
            takes_new=report.engine_up and not report.draining and not leaving,
            serves=not (report.draining or down_long or leaving),
            leaving=leaving,
            # As it was for the room, while that holds.
            assigned=dict(self.assigned.get(worker, {})) if room is None else room.assigned,
            reported=reported,
            shares=self._sharing(worker),
            failed=self._failures.of(worker),
            labels={"worker": worker, "device_kind": report.device_kind, **report.labels},
            slowness=self.tracker.slowness(worker),
            room=room,
        )
        if room is None:
            room = self._rooms[worker] = Room(seen, models, models.columns.row)
            seen = msgspec.structs.replace(seen, room=room)
        return seen
