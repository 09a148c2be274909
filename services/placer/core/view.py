"""What the placer decides on: a snapshot of workers and active models. Data only.

Times are seconds of one clock that only grows (the caller's); ages in reports are converted
by whoever builds a view. A view is never changed: `changes.applied` gives the one after a plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

from shared.control import ModelReport
from shared.models import Footprint, Placement
from shared.names import ModelId


class Demand(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is asked of one model."""

    rate_fast: float = 0.0
    """Requests per second, over about the last second."""
    rate_slow: float = 0.0
    """Requests per second, over about the last minute."""
    seconds_per_item: float = 0.0
    """Device seconds per request at the batch size it reaches. 0: not measured yet."""
    ready: int = 0
    """Messages that wait in the broker, as far as it was asked."""
    held: int = 0
    """Messages that workers have taken and not yet answered."""
    need: float = 0.0
    """Device-seconds per second that would serve all this in time."""
    catching_up: float = 0.0
    """Of `need`, what works off what waits: it is over soon."""
    last_active: float = 0.0
    """When anything was last asked of it."""

    @property
    def backlog(self) -> int:
        return self.ready + self.held


class Binding(msgspec.Struct, frozen=True, gc=False):
    """That a worker is to consume a model's queue, since when and why."""

    since: float
    reason: str = ""
    spare: bool = False
    """A copy that nobody needs yet, in memory that nobody needs: first to make room."""


class ModelView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One active model: it has a queue, and is to have at least one binding."""

    model: ModelId
    size_bytes: int = 0
    min_copies: int = 0
    max_copies: int | None = None
    stateful: bool = False
    priority: int = 0
    demand: Demand = Demand()
    waiting: bool = False
    """Requests were put into its queue, and no worker has been seen consuming it since."""
    known: Mapping[str, Footprint] = {}
    """Footprints measured earlier, by kind of device."""
    estimate: Footprint | None = None
    """As the repository has looked into its file: the weights, and what others have too."""
    load_seconds: float = 0.0
    """The longest that a worker took to load it. 0: not known."""
    low_since: float | None = None
    """Since when one copy fewer would do."""
    target_s: float = 0.1
    """Latency that is aimed at for one request."""
    placement: Placement = Placement()
    tenant: str = ""
    """Whose it is (`shared.models.Manifest.tenant`)."""

    def copies_limit(self, workers: int) -> int:
        if self.stateful:
            return min(1, workers)
        return workers if self.max_copies is None else min(workers, self.max_copies)


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """One worker that reports."""

    worker: str
    device_kind: str = "cpu"
    budget_bytes: int
    host_bytes: int = 0
    """What it holds in its host's memory and swaps in when asked: so much may be assigned beyond
    its device's budget (`shared.fit.fit_tiers`)."""
    takes_new: bool = True
    """Neither draining nor without its engine."""
    serves: bool = True
    """Its bindings count. False when it leaves, or its engine has been down for long."""
    stalled: bool = False
    """Its engine is down, or it has gone silent: it may be back soon, and keeps its bindings, but
    what is asked meanwhile is not served by them."""
    leaving: bool = False
    """It was asked to leave: what it has is bound elsewhere first."""
    assigned: Mapping[ModelId, Binding] = {}
    reported: Mapping[ModelId, ModelReport] = {}
    failed: Mapping[ModelId, str] = {}
    """Models that it could not load lately, and why."""
    suspects: Collection[ModelId] = ()
    """Of these, what it has not tried itself, since an engine of another one ended of it."""
    shares: bool = True
    """Whether it keeps once what several models have, as far as it has shown."""
    labels: Mapping[str, str] = {}
    """As it reports them (`shared.models.Placement`)."""
    copied_s: float = 0.0
    """Seconds of loading that it was given lately, decaying (`Policy.load_share`)."""
    slowness: float = 1.0
    """Its own measured seconds per request over the fleet's mean, of the models that it has."""
    room: object = None
    """What all that is assigned takes, where the maker of the view has it at hand: a
    `rooms.Room`, which is made of what is here."""

    def is_bound(self, model: ModelId) -> bool:
        report = self.reported.get(model)
        return report is not None and report.bound


class Move(msgspec.Struct, frozen=True):
    """A binding on its way from one worker to another: bound there before it goes here."""

    model: ModelId
    source: str
    target: str
    since: float
    done: float | None = None
    """Since when only the target has it; nothing undoes it for a while."""


class Pace(msgspec.Struct, frozen=True):
    """What spreads over time that which nobody waits for."""

    spared: float | None = None
    """When spare copies were last added."""
    balanced: float | None = None
    """When it was last looked for workers that are asked too much."""
    moves: tuple[Move, ...] = ()
    """Under way, or done lately."""
    hot: Mapping[str, float] = {}
    """Workers that are asked for too much, and since when."""
    put_off: Mapping[ModelId, float] = {}
    """Models that are due and were not looked at, as there was too much to decide
    (`Policy.work_per_tick`), and since when."""
    searched: Mapping[ModelId, frozenset[str]] = {}
    """Of these, workers where nobody can make room: the search goes on with the others."""
    over_quota: Mapping[ModelId, float] = {}
    """Models without a copy whose tenant may have no more, and since when."""
    unfinished: bool = False
    """These, or a worker that has more than it can serve: the next planning is to come at once."""


class FleetSince(msgspec.Struct, frozen=True):
    """Since when the fleet as a whole has been too small or too large."""

    short: float | None = None
    ample: float | None = None
    idle: float | None = None
    """Since when nobody has asked for anything."""


class Quota(msgspec.Struct, frozen=True, gc=False):
    """What one tenant may have of the whole fleet (`shared.tenants`)."""

    device_bytes: int | None = None
    share: float = 1.0


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the placer knows when it decides."""

    at: float
    workers: Mapping[str, WorkerView] = {}
    models: Mapping[ModelId, ModelView] = {}
    fleet_since: FleetSince = FleetSince()
    pace: Pace = Pace()
    quotas: Mapping[str, Quota] = {}
    """What tenants may have, of those of whom something is said."""


def footprint(worker: WorkerView, model: ModelId, facts: ModelView | None) -> Footprint:
    """What the model takes on this worker: measured there, else measured on such a device, else
    what the worker reads in the file, else what the repository has read there, else the file's
    size. Measured or not, what it has in common with others is told by the file. What is to be
    alone takes the whole device, for good: so nothing has room beside it."""
    size = _own_size(worker, model, facts)
    if facts is None or not facts.placement.alone:
        return size
    whole = max(worker.budget_bytes, size.weights_bytes + size.workspace_bytes)
    return Footprint(whole, 0, measured=size.measured, pinned=True)


def _own_size(worker: WorkerView, model: ModelId, facts: ModelView | None) -> Footprint:
    report = worker.reported.get(model)
    if report is not None and report.footprint.measured and report.footprint.weights_bytes:
        return report.footprint
    if facts is not None and worker.device_kind in facts.known:
        return _as_held(worker, facts.known[worker.device_kind])
    if report is not None and report.footprint.weights_bytes:
        return report.footprint
    if facts is None:
        return Footprint(0, 0, measured=False)
    return _as_held(worker, expected(worker.device_kind, facts))


def expected(device_kind: str, facts: ModelView) -> Footprint:
    """What the model takes on a device of this kind whose worker has not looked at it."""
    known = facts.known.get(device_kind)
    if known is not None:
        return known
    if facts.estimate is not None:
        return facts.estimate
    return Footprint(facts.size_bytes, 0, measured=False, pinned=facts.stateful)


def _as_held(worker: WorkerView, size: Footprint) -> Footprint:
    if worker.shares or not size.shares:
        return size
    return msgspec.structs.replace(size, shares=())


def copies(view: View) -> dict[ModelId, int]:
    """Bindings assigned on workers that serve, per model that has any."""
    count: dict[ModelId, int] = {}
    for worker in view.workers.values():
        if worker.serves:
            for model in worker.assigned:
                count[model] = count.get(model, 0) + 1
    return count


def residents(
    worker: WorkerView, models: Iterable[ModelId], facts: Mapping[ModelId, ModelView]
) -> list[Footprint]:
    """Footprints of these models on this worker."""
    return [footprint(worker, model, facts.get(model)) for model in models]
