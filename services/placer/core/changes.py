"""What a planning decides: changes of bindings, and every "no" with its reason and numbers."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from services.placer.core.refused import Refused
from services.placer.core.view import Binding, FleetSince, Pace, View
from services.placer.core.wanted import Wanted
from shared.names import ModelId


class Considered(msgspec.Struct, frozen=True, gc=False):
    """One worker as it was judged for a copy: the least score is taken."""

    worker: str
    score: float
    """busy + loading + memory, as `Policy` weighs them, + regret."""
    busy: float
    """Device-seconds per second that are asked of it."""
    load_s: float
    """Seconds until the copy would be on its device."""
    free_bytes: int
    """Of its device."""
    regret: float = 0.0
    """Of the models that would make room."""


class Bind(msgspec.Struct, frozen=True, gc=False):
    model: ModelId
    worker: str
    reason: str
    load_s: float = 0.0
    """Seconds of loading that it costs the worker."""
    spare: bool = False
    """Nobody needs it yet (`view.Binding.spare`)."""
    considered: tuple[Considered, ...] = ()
    """The chosen worker first, then the next best."""


class Unbind(msgspec.Struct, frozen=True, gc=False):
    model: ModelId
    worker: str
    reason: str
    idle: bool = False
    """Right only while nothing is asked of the model."""


class Retire(msgspec.Struct, frozen=True):
    """The model stops being active: its routing keys go, and its queue when it is empty."""

    model: ModelId
    reason: str
    code: str | None = None
    """When set, what is left in the queue is answered with this error and `reason`."""


class Explained(msgspec.Struct, frozen=True, gc=False):
    """Why a model has as many bindings as it has."""

    want: int
    copies: int
    need: float
    why: str


class Held(msgspec.Struct, frozen=True, gc=False):
    """What one tenant has of the fleet, after the plan."""

    tenant: str
    """Empty: nobody's models."""
    device_bytes: int = 0
    """Weights and workspace of the copies of its models."""
    need: float = 0.0
    """Device-seconds per second that its models are asked for."""
    given: float = 0.0
    """Of that, what is planned for: less where all together ask for more than there is."""
    active_models: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to change, and why nothing else."""

    bind: tuple[Bind, ...] = ()
    unbind: tuple[Unbind, ...] = ()
    retire: tuple[Retire, ...] = ()
    refused: tuple[Refused, ...] = ()
    wanted: Wanted = Wanted()
    explained: Mapping[ModelId, Explained] = {}
    """Of models for which more was wanted than they had."""
    low_since: Mapping[ModelId, float] = {}
    """To be kept for the next view: since when each model has had a copy too many."""
    fleet_since: FleetSince = FleetSince()
    pace: Pace = Pace()
    tenants: tuple[Held, ...] = ()
    """Those that have active models; none where all is nobody's."""

    @property
    def changes(self) -> bool:
        return bool(self.bind or self.unbind or self.retire)

    def additions(self) -> Plan:
        """Only what takes nothing from anybody: for when the view may be incomplete."""
        disturbed = {gone.worker for gone in self.unbind}
        return msgspec.structs.replace(
            self,
            bind=tuple(new for new in self.bind if new.worker not in disturbed),
            unbind=(),
            retire=(),
            low_since={},
        )

    def __str__(self) -> str:
        said = [f"+{b.model}@{b.worker} ({b.reason})" for b in self.bind]
        said += [f"-{u.model}@{u.worker} ({u.reason})" for u in self.unbind]
        said += [f"retire {r.model} ({r.reason})" for r in self.retire]
        said += [f"no {r.model}: {r.refusal}" for r in self.refused]
        return "; ".join(said) or "nothing to change"


def applied(view: View, plan: Plan) -> View:
    """The view once the plan has been carried out, before any worker has reacted."""
    assigned = {name: dict(worker.assigned) for name, worker in view.workers.items()}
    copied = {name: worker.copied_s for name, worker in view.workers.items()}
    for gone in plan.unbind:
        assigned[gone.worker].pop(gone.model, None)
    for new in plan.bind:
        assigned[new.worker][new.model] = Binding(view.at, new.reason, new.spare)
        copied[new.worker] += new.load_s
    left = {retired.model for retired in plan.retire}
    return View(
        at=view.at,
        workers={
            name: msgspec.structs.replace(worker, assigned=assigned[name], copied_s=copied[name])
            for name, worker in view.workers.items()
        },
        models={
            model: msgspec.structs.replace(facts, low_since=plan.low_since.get(model))
            for model, facts in view.models.items()
            if model not in left
        },
        fleet_since=plan.fleet_since,
        pace=plan.pace,
        quotas=view.quotas,
    )
