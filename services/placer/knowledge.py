"""What this placer knows and wants, in one place and without awaits.

`assigned` is what it wants; what was written to the store and to the broker follows it
(apply.py). Laws: `assigned` has exactly the workers that report; every assigned model is
active; a model is active or being retired, never both.

Times are monotonic, but for `Event.at`, which people read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from services.placer.core.demand import DemandTracker
from services.placer.core.plan import Plan, Retire
from services.placer.core.policy import Policy
from services.placer.core.view import Binding, FleetSince, ModelView, View, WorkerView
from shared.control import ModelReport, Report
from shared.fit import can_be_served
from shared.models import Footprint, Manifest
from shared.names import ModelId, split_model_id

EVENTS_KEPT = 1000


class Event(msgspec.Struct, frozen=True):
    """One thing that happened, for people."""

    at: float
    what: str
    model: str = ""
    worker: str = ""
    why: str = ""


class Active:
    """One active model."""

    __slots__ = (
        "bound_keys", "declared", "depth", "estimate", "known", "looked_into", "manifest",
        "routed_at", "waiting_at",
    )  # fmt: skip

    def __init__(self, manifest: Manifest | None) -> None:
        self.manifest = manifest
        self.declared = False
        """Whether its queue was declared by this placer."""
        self.known: dict[str, Footprint] = {}
        """Measured footprints by kind of device."""
        self.estimate: Footprint | None = None
        """What the repository read in its file."""
        self.looked_into = False
        """Whether it was asked."""
        self.depth = 0
        self.waiting_at: float | None = None
        """When a request was last put into its queue while nobody consumed it."""
        self.bound_keys: set[str] | None = None
        """Routing keys that lead to its queue; None: not known (an earlier placer's)."""
        self.routed_at = 0.0
        """When its keys were last bound."""


class Retiring(msgspec.Struct, frozen=True):
    """A model whose queue is to go."""

    gone: Retire
    active: Active
    """What was known of it, should it be asked again meanwhile."""


class _Failure(msgspec.Struct):
    incarnation: str
    until: float
    error: str


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
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.last_plan = Plan()
        self._copies: dict[ModelId, int] = {}
        self._failures: dict[tuple[str, ModelId], _Failure] = {}
        self._engine_down: dict[str, float] = {}
        self._low_since: dict[ModelId, float] = {}
        self._fleet_since = FleetSince()

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
        for worker, report in self.reports.items():
            if before.get(worker) is not report:
                self.reported[worker] = {model.model: model for model in report.models}
            self._note_engine(report, now)
            self._note_failures(report, now)
        for model, depth in depths.items():
            active = self.active.get(model)
            if active is not None:
                active.depth = depth
                if not depth and active.waiting_at is not None and active.waiting_at < asked_at:
                    active.waiting_at = None
        self._find_consumers()
        self._learn_sizes()
        known = {model: active.depth for model, active in self.active.items()}
        self.tracker.observe(self.reports.values(), known, now)

    def adopt(self, worker: str, models: dict[ModelId, str], generation: int) -> None:
        """Takes what stands for a worker that was not known: its stored assignment, or what
        it has bound. Models that are not active must be activated before."""
        now = self.clock()
        self.assigned[worker] = {}
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

    # --- what is active ---------------------------------------------------------------------

    def activate(self, model: ModelId, manifest: Manifest | None, *, why: str) -> Active:
        """Makes the model active, or returns what it is already."""
        active = self.active.get(model)
        if active is None:
            retiring = self.retiring.pop(model, None)
            active = self.active[model] = Active(manifest) if retiring is None else retiring.active
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
            if model not in self.consumers:
                active.waiting_at = now

    def retire(self, gone: Retire) -> None:
        """Takes the model from all workers and out of what is active."""
        for worker in self.assigned:
            self._drop(worker, gone.model)
        active = self.active.pop(gone.model, None)
        if active is not None:
            active.waiting_at = None
            self.retiring[gone.model] = Retiring(gone, active)
            self._low_since.pop(gone.model, None)
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
        """A snapshot to decide on; with `newcomer` as if that were active."""
        now = self.clock()
        models = {
            model: self._model_view(model, active, now) for model, active in self.active.items()
        }
        if newcomer is not None and newcomer[0] not in models:
            models[newcomer[0]] = self._model_view(*newcomer, now)
        return View(
            at=now,
            workers={
                worker: self._worker_view(worker, report, now)
                for worker, report in self.reports.items()
            },
            models=models,
            fleet_since=self._fleet_since,
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
                self._put(new.worker, new.model, Binding(now, new.reason))
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

    # --- parts ------------------------------------------------------------------------------

    def _put(self, worker: str, model: ModelId, binding: Binding) -> None:
        models = self.assigned[worker]
        if model not in models:
            self._copies[model] = self._copies.get(model, 0) + 1
        models[model] = binding

    def _drop(self, worker: str, model: ModelId) -> bool:
        if self.assigned.get(worker, {}).pop(model, None) is None:
            return False
        self._copies[model] -= 1
        if not self._copies[model]:
            del self._copies[model]
        return True

    def _find_consumers(self) -> None:
        self.consumers = {}
        for worker, models in self.reported.items():
            for model, report in models.items():
                if report.bound:
                    self.consumers.setdefault(model, []).append(worker)
        for model in self.consumers:
            active = self.active.get(model)
            if active is not None:
                active.waiting_at = None

    def _lose(self, worker: str) -> None:
        for model in list(self.assigned.get(worker, ())):
            self._drop(worker, model)
        self.reported.pop(worker, None)
        self.assigned.pop(worker, None)
        self.generations.pop(worker, None)
        self._engine_down.pop(worker, None)
        for key in [key for key in self._failures if key[0] == worker]:
            del self._failures[key]
        self.note("worker left", worker=worker, why="no report any more")

    def _note_engine(self, report: Report, now: float) -> None:
        if report.engine_up:
            self._engine_down.pop(report.worker, None)
        else:
            self._engine_down.setdefault(report.worker, now)

    def _note_failures(self, report: Report, now: float) -> None:
        for key, failure in list(self._failures.items()):
            if key[0] == report.worker and (
                failure.until <= now or failure.incarnation != report.incarnation
            ):
                del self._failures[key]
        wanted = self.assigned.get(report.worker, {})
        failed = [m for m in report.models if m.phase == "failed" and m.model in wanted]
        if not failed or report.generation < self.generations.get(report.worker, 0):
            return  # it speaks of an assignment that was changed since
        sizes = [m.footprint for m in report.models if m.model in wanted]
        if not can_be_served(sizes, report.budget_bytes, report.host_budget_bytes):
            return  # it was measured larger than planned with: the plan makes room, or moves it
        for model in failed:
            self._failures[report.worker, model.model] = _Failure(
                report.incarnation, now + self.policy.retry_failed_s, model.error or "no reason"
            )

    def _learn_sizes(self) -> None:
        """What one worker measured holds for others of its kind, also after it is gone."""
        for worker, models in self.reported.items():
            kind = self.reports[worker].device_kind
            for model, report in models.items():
                active = self.active.get(model)
                if active is not None and report.footprint.measured:
                    active.known[kind] = report.footprint

    def _model_view(self, model: ModelId, active: Active, now: float) -> ModelView:
        manifest = active.manifest
        target_s = 0.1 if manifest is None else manifest.target_ms / 1000
        demand = self.tracker.demand(model, active.depth, target_s, now)
        if manifest is None:
            return ModelView(
                model=model,
                demand=demand,
                waiting=active.waiting_at is not None,
                known=active.known,
                load_seconds=self.tracker.load_seconds(model),
                low_since=self._low_since.get(model),
            )
        return ModelView(
            model=model,
            size_bytes=manifest.size_bytes,
            # An older version is not kept warm: the default one is what most clients mean.
            min_copies=manifest.min_copies if self.is_default(model) else 0,
            max_copies=manifest.max_copies,
            stateful=manifest.stateful,
            priority=manifest.priority,
            demand=demand,
            waiting=active.waiting_at is not None,
            known=active.known,
            estimate=active.estimate,
            load_seconds=self.tracker.load_seconds(model),
            low_since=self._low_since.get(model),
        )

    def _shares(self, worker: str) -> bool:
        """A worker that has models with common parts, and shares none, is not set to share."""
        apart = False
        for model, report in self.reported.get(worker, {}).items():
            if report.footprint.shares:
                return True
            active = self.active.get(model)
            common = active is not None and active.estimate is not None and active.estimate.shares
            apart = apart or bool(common and report.footprint.weights_bytes)
        return not apart

    def _worker_view(self, worker: str, report: Report, now: float) -> WorkerView:
        down_since = self._engine_down.get(worker)
        down_long = down_since is not None and now - down_since >= self.policy.engine_grace_s
        return WorkerView(
            worker=worker,
            device_kind=report.device_kind,
            budget_bytes=report.budget_bytes if report.engine_up else 0,
            host_bytes=report.host_budget_bytes if report.engine_up else 0,
            takes_new=report.engine_up and not report.draining,
            serves=not (report.draining or down_long),
            assigned=dict(self.assigned.get(worker, {})),
            reported=self.reported.get(worker, {}),
            shares=self._shares(worker),
            failed={
                model: failure.error
                for (name, model), failure in self._failures.items()
                if name == worker
            },
        )
