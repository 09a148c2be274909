"""What this placer knows and wants, in one place and without awaits.

`assigned` is what it wants; what was written to the store and to the broker follows it
(apply.py). Laws: `assigned` has exactly the workers that report; every assigned model is
active; a model is active or being retired, never both. What reports tell of workers, and what
waits in queues, are parts with laws of their own (workers.py, waiting.py).

Times are monotonic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from services.placer.core.changes import Plan, Retire
from services.placer.core.demand import DemandTracker
from services.placer.core.policy import Policy
from services.placer.core.view import Binding, FleetSince, Pace, Quota, View
from services.placer.history import History
from services.placer.names import Names
from services.placer.picture import Active, Picture
from services.placer.waiting import Waiting
from services.placer.workers import Workers
from shared import tenants
from shared.control import ModelReport, Report
from shared.models import Manifest
from shared.names import ModelId, split_model_id

__all__ = ["Active", "Knowledge", "Retiring"]


class Retiring(msgspec.Struct, frozen=True):
    """A model whose queue is to go."""

    gone: Retire
    active: Active
    """What was known of it, should it be asked again meanwhile."""


class Knowledge:
    """See the module's text. For one event loop, and one term of the lease."""

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.monotonic) -> None:
        self.policy = policy
        self.clock = clock
        self.tracker = DemandTracker(policy)
        self.assigned: dict[str, dict[ModelId, Binding]] = {}
        self.active: dict[ModelId, Active] = {}
        self.retiring: dict[ModelId, Retiring] = {}
        self.defaults: dict[str, int] = {}
        """What the bare name means, by name, of active models: the highest registered version, or
        where the alias `default` leads."""
        self.names = Names()
        self.flips: dict[ModelId, str] = {}
        """What aliases that are to lead to a version wait for, for people."""
        self.generations: dict[str, int] = {}
        """Generation of the assignment last written, by worker."""
        self.quotas: Mapping[str, Quota] = {}
        """What tenants may have, of those of whom something is said."""
        self.shares: dict[str, float] = {}
        """Of device time, by tenant, where not 1; never changed, but replaced."""
        self._held: set[ModelId] = set()
        self.version = 0
        """Grows with everything that another view would show."""
        self.saturated: set[ModelId] = set()
        """Models of which some worker has taken all that it may at once."""
        self.history = History()
        self.last_plan = Plan()
        self._copies: dict[ModelId, int] = {}
        self._picture = Picture(self.tracker, policy)
        self._waiting = Waiting(self.active, self.tracker)
        self._workers = Workers(
            self.tracker, policy, self.history, self.active, self.assigned, self.generations
        )
        self._low_since: dict[ModelId, float] = {}
        self._fleet_since = FleetSince()
        self._pace = Pace()

    def __repr__(self) -> str:
        return (
            f"<Knowledge workers={len(self.reports)} active={len(self.active)} "
            f"retiring={len(self.retiring)}>"
        )

    @property
    def reports(self) -> Mapping[str, Report]:
        """The newest of every worker that is there."""
        return self._workers.reports

    @property
    def reported(self) -> Mapping[str, Mapping[ModelId, ModelReport]]:
        """What they tell of each model."""
        return self._workers.reported

    @property
    def leaving(self) -> AbstractSet[str]:
        """Workers that were asked to leave, of those that report."""
        return self._workers.leaving

    @property
    def consumers(self) -> Mapping[ModelId, Sequence[str]]:
        """Workers that consume each model's queue, as they report."""
        return self._workers.consumers.by_model

    def note(self, what: str, model: str = "", worker: str = "", why: str = "") -> None:
        self.history.note(what, model, worker, why)

    # --- what is seen -----------------------------------------------------------------------

    def see(self, reports: Iterable[Report], depths: dict[ModelId, int], asked_at: float) -> None:
        """The newest report of every worker that is there, and the depths that were asked for
        at `asked_at` or later. A worker without a report is gone; a new one must have been
        adopted before."""
        for gone in self._workers.see(reports, self.clock()):
            for model in list(self.assigned.get(gone, ())):
                self._drop(gone, model)
            self.assigned.pop(gone, None)
            self.generations.pop(gone, None)
        self.see_depths(depths, asked_at)
        self._waiting.consumed(self.consumers)
        self.saturated = self._workers.consumers.saturated()

    def see_depths(self, depths: dict[ModelId, int], asked_at: float) -> None:
        """What waits in these models' queues, as asked for at `asked_at` or later."""
        self.version += 1
        self._waiting.see(depths, asked_at, self.clock())

    def requests_per_message(self, model: ModelId) -> float:
        """Of late, by those that consume its queue; else what they said last."""
        active = self.active.get(model)
        told = [
            report.requests_per_message
            for worker in self.consumers.get(model, ())
            if (report := self.reported.get(worker, {}).get(model)) is not None
        ]
        if active is None or not told:
            return 1.0 if active is None else active.requests_per_message
        active.requests_per_message = max(sum(told) / len(told), 1.0)
        return active.requests_per_message

    def adopt(
        self, worker: str, models: dict[ModelId, str], generation: int, *, leaving: bool = False
    ) -> None:
        """Takes what stands for a worker that was not known: its stored assignment, or what
        it has bound. Models that are not active must be activated before."""
        now = self.clock()
        self.assigned[worker] = {}
        if leaving:
            self._workers.leave(worker)
        for model, reason in models.items():
            if model in self.active:
                self._put(worker, model, Binding(now, reason))
        self.generations[worker] = generation
        self.note("worker joined", worker=worker)

    def copies(self, model: ModelId) -> int:
        """Workers to which the model is assigned."""
        return self._copies.get(model, 0)

    def bindings(self) -> list[tuple[ModelId, int]]:
        """Active models, and to how many workers each is assigned."""
        return [(model, self.copies(model)) for model in list(self.active)]

    def in_hand(self, model: ModelId) -> list[str]:
        """Workers that may hold messages of the model's queue: that consume it, that hold some,
        or that have not been seen to follow their last assignment."""
        return self._workers.in_hand(model)

    def device_kinds(self) -> set[str]:
        return {report.device_kind for report in self.reports.values() if report.device_kind}

    # --- who leaves -------------------------------------------------------------------------

    def leave(self, worker: str, why: str) -> None:
        """The worker, which must report, is to leave once others have what it has."""
        if self._workers.leave(worker):
            self.note("worker leaves", worker=worker, why=why)

    def stay(self, worker: str) -> None:
        """Takes that back."""
        if self._workers.stay(worker):
            self.note("worker stays", worker=worker)

    # --- what is active ---------------------------------------------------------------------

    def activate(self, model: ModelId, manifest: Manifest | None, *, why: str) -> Active:
        """Makes the model active, or returns what it is already."""
        active = self.active.get(model)
        if active is None:
            retiring = self.retiring.pop(model, None)
            active = self.active[model] = Active(manifest) if retiring is None else retiring.active
            self._waiting.look_at(model)
            self.version += 1
            self.tracker.touch(model, self.clock())
            self.note("activated", model, why=why)
        if active.manifest is None:
            active.manifest = manifest
        return active

    def wait(self, model: ModelId) -> None:
        """A request was put into the model's queue."""
        if model in self.active:
            now = self.clock()
            self.tracker.touch(model, now)
            self.version += 1
            if model not in self.consumers:
                self._waiting.put(model, now)

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
            self.history.placed.pop(gone.model, None)
            self.note("retired", gone.model, why=gone.reason)

    def forget(self, model: ModelId) -> None:
        """The model's queue is gone."""
        self.retiring.pop(model, None)
        if model not in self.active:
            self.tracker.forget(model)

    def is_default(self, model: ModelId) -> bool:
        name, version = split_model_id(model)
        return self.defaults.get(name) == version

    def is_meant(self, model: ModelId) -> bool:
        """Whether the bare name or an alias sends requests to the version."""
        return self.is_default(model) or self.names.mean(model)

    def hold(self, copies: Mapping[ModelId, int], flips: Mapping[ModelId, str]) -> None:
        """These are to have so many copies at least, and all others what they are asked for."""
        for model in self._held | copies.keys():
            active, least = self.active.get(model), copies.get(model, 0)
            if active is not None and active.least_copies != least:
                active.least_copies = least
                self.version += 1
        self._held = set(copies)
        self.flips = dict(flips)

    def bound_tenants(self, told: Mapping[str, tenants.Quota]) -> None:
        """From now on tenants may have so much, and all others what they like."""
        quotas = {name: Quota(each.device_bytes, each.share) for name, each in told.items()}
        if quotas != self.quotas:
            self.quotas = quotas
            shares = {name: quota.share for name, quota in quotas.items() if quota.share != 1.0}
            self.shares = shares if shares != self.shares else self.shares
            self.version += 1
            self.note("quotas of tenants", why=f"{len(quotas)} tenants have some")

    # --- what is decided --------------------------------------------------------------------

    def view(self, newcomer: tuple[ModelId, Active] | None = None) -> View:
        """A snapshot to decide on; with `newcomer` as if that were active. Costs what changed,
        and a few operations on whole columns."""
        now = self.clock()
        warm = {model: self.is_meant(model) for model in self._picture.warm}
        views, asked = self._workers.views, self._waiting.asked()
        views.resized_models(self._picture.refresh(self.active, warm, now))
        if newcomer is None or newcomer[0] in self.active:
            models = self._picture.models(asked, self._low_since)
        else:
            models = self._picture.models_with(*newcomer, asked, self._low_since, now)
        return View(
            at=now,
            workers={w: views.view(report, models, now) for w, report in self.reports.items()},
            models=models,
            fleet_since=self._fleet_since,
            pace=self._pace,
            quotas=self.quotas,
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
                self.history.place(new)
                self._workers.views.charge(new.worker, new.load_s, now)
                touched.add(new.worker)
        for retired in plan.retire:
            self.retire(retired)
        return touched

    def remember(self, plan: Plan) -> None:
        """Keeps what the next planning needs of this one, and its explanations."""
        self.history.compare(self.last_plan, plan)
        self.last_plan = plan
        self._low_since = dict(plan.low_since)
        self._fleet_since = plan.fleet_since
        self._pace = plan.pace

    # --- parts ------------------------------------------------------------------------------

    def _put(self, worker: str, model: ModelId, binding: Binding) -> None:
        models = self.assigned[worker]
        if model not in models:
            self._copies[model] = self._copies.get(model, 0) + 1
        models[model] = binding
        self.version += 1
        self._workers.views.reassigned(worker)

    def _drop(self, worker: str, model: ModelId) -> bool:
        if self.assigned.get(worker, {}).pop(model, None) is None:
            return False
        self.version += 1
        self._workers.views.reassigned(worker)
        self._copies[model] -= 1
        if not self._copies[model]:
            del self._copies[model]
        return True
