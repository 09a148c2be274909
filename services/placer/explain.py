"""The placer's knowledge as people read it: `GET /explain/...` and `GET /fleet`."""

from __future__ import annotations

from typing import Any

import msgspec

from services.placer.core.changes import Held
from services.placer.core.fleet import Fleet
from services.placer.core.plan import want
from services.placer.core.tenancy import UNBOUNDED
from services.placer.core.view import ModelView, View
from services.placer.core.wanted import Wanted
from services.placer.history import Event
from services.placer.knowledge import Knowledge
from shared.models import Footprint, Manifest
from shared.names import ModelId, model_queue
from shared.quarantine import Held as Quarantined

_EVENTS = 20
_FLEET_EVENTS = 50


def explain(
    knowledge: Knowledge, manifest: Manifest, quarantined: Quarantined | None = None
) -> dict[str, Any]:
    """Why one registered model is where it is, or nowhere."""
    model = manifest.id
    view = knowledge.view()
    facts = view.models.get(model)
    state = "active" if facts is not None else "registered, nobody asks for it"
    if quarantined is not None:
        state = f"quarantined: {quarantined.reason}"
    elif model in knowledge.retiring:
        state = f"being retired: {knowledge.retiring[model].gone.reason}"
    active = knowledge.active.get(model)
    return {
        "model": model,
        "state": state,
        "default_version": knowledge.is_default(model) if facts is not None else None,
        "queue": model_queue(model) if facts is not None else None,
        "routing_keys": sorted((active.bound_keys if active else None) or ()),
        "want": 0 if facts is None else _want(view, facts, knowledge),
        "why": _why(knowledge, model) if quarantined is None else quarantined.error().message,
        "quarantined": quarantined,
        "alias": knowledge.flips.get(model),
        "demand": None if facts is None else _demand(view, facts),
        "tenant": _tenant_of(knowledge, manifest.tenant),
        "last_placement": _placement(knowledge, model),
        "move": _move(view, model),
        "workers": [
            seat
            for worker in view.workers
            if (seat := _seat(view, knowledge, worker, model)) is not None
        ],
        "refusals": [
            {
                "kind": no.kind,
                "reason": no.refusal.reason,
                "need_bytes": no.refusal.need_bytes,
                "free_bytes": no.refusal.free_bytes,
                "permanent": no.permanent,
            }
            for no in knowledge.last_plan.refused
            if no.model == model
        ],
        "events": [_event(e) for e in knowledge.history.events if e.model == model][-_EVENTS:],
    }


def _why(knowledge: Knowledge, model: ModelId) -> str | None:
    """Why it has not as many workers as it should, as far as that was looked at."""
    put_off = knowledge.last_plan.pace.put_off.get(model)
    if put_off is not None:
        return (
            f"so much is to be decided that its turn comes at one of the next cycles; it has "
            f"waited for {knowledge.clock() - put_off:.1f} s"
        )
    explained = knowledge.last_plan.explained.get(model)
    return explained.why if explained is not None and explained.why else None


def fleet(knowledge: Knowledge, wanted: Wanted, fence: int) -> dict[str, Any]:
    """The workers with what they hold, and how many there should be."""
    view = knowledge.view()
    workers = []
    for name, report in sorted(knowledge.reports.items()):
        models = view.workers[name].assigned.keys() | knowledge.reported.get(name, {}).keys()
        workers.append(
            {
                "worker": name,
                "device_kind": report.device_kind,
                "device_name": report.device_name,
                "budget_bytes": report.budget_bytes,
                "used_bytes": report.used_bytes,
                "measured_bytes": report.measured_bytes,
                "host_budget_bytes": report.host_budget_bytes,
                "host_used_bytes": report.host_used_bytes,
                "engine_up": report.engine_up,
                "stalled": view.workers[name].stalled,
                "engine_restarts": report.engine_restarts,
                "draining": report.draining,
                "leaving": name in knowledge.leaving,
                "generation": report.generation,
                "generation_written": knowledge.generations.get(name, 0),
                "models": [_seat(view, knowledge, name, model) for model in sorted(models)],
            }
        )
    return {
        "fence": fence,
        "workers": workers,
        "workers_wanted": {"count": wanted.workers, "reasons": list(wanted.reasons)},
        "tenants": _tenants(knowledge),
        "active_models": len(knowledge.active),
        "retiring_models": len(knowledge.retiring),
        "refused": [
            {"model": no.model, "reason": str(no.refusal)} for no in knowledge.last_plan.refused
        ],
        "events": [_event(event) for event in list(knowledge.history.events)[-_FLEET_EVENTS:]],
    }


def _tenants(knowledge: Knowledge) -> list[dict[str, Any]]:
    """Those of whom something is said or who have active models, as of the last plan; none where
    all is nobody's."""
    known = {each.tenant: each for each in knowledge.last_plan.tenants}
    names = sorted(known.keys() | knowledge.quotas.keys())
    return [_tenant(knowledge, known.get(name, Held(name))) for name in names]


def _tenant(knowledge: Knowledge, has: Held) -> dict[str, Any]:
    quota = knowledge.quotas.get(has.tenant, UNBOUNDED)
    return {
        "tenant": has.tenant,
        "share": quota.share,
        "device_bytes": has.device_bytes,
        "device_bytes_quota": quota.device_bytes,
        "need_device_seconds_per_second": has.need,
        "given_device_seconds_per_second": has.given,
        "active_models": has.active_models,
    }


def _tenant_of(knowledge: Knowledge, name: str) -> dict[str, Any] | None:
    if not name:
        return None
    known = {each.tenant: each for each in knowledge.last_plan.tenants}
    return _tenant(knowledge, known.get(name, Held(name)))


def _placement(knowledge: Knowledge, model: ModelId) -> dict[str, Any] | None:
    """Where it was last placed, and with which scores: the least is taken."""
    placed = knowledge.history.placed.get(model)
    if placed is None:
        return None
    return {
        "at": placed.at,
        "worker": placed.worker,
        "why": placed.why,
        "considered": [
            {
                "worker": each.worker,
                "score": each.score,
                "busy_device_seconds_per_second": each.busy,
                "load_seconds": each.load_s,
                "free_bytes": each.free_bytes,
                "regret": each.regret,
            }
            for each in placed.considered
        ],
    }


def _move(view: View, model: ModelId) -> dict[str, Any] | None:
    """The move that the model is on, from a worker that is asked too much."""
    for move in view.pace.moves:
        if move.model == model and move.done is None:
            return {"from": move.source, "to": move.target, "for_s": view.at - move.since}
    return None


def _want(view: View, facts: ModelView, knowledge: Knowledge) -> int:
    fleet = Fleet(view, knowledge.policy)
    row = fleet.columns.row[facts.model]
    need = float(fleet.columns.need[row])  # of what its tenant asks for, what it is to have
    given = msgspec.structs.replace(facts.demand, need=need)
    facts = msgspec.structs.replace(facts, demand=given)
    return want(facts, fleet.serving, knowledge.policy)


def _demand(view: View, facts: ModelView) -> dict[str, Any]:
    demand = facts.demand
    return {
        "need_device_seconds_per_second": demand.need,
        "requests_per_second_fast": demand.rate_fast,
        "requests_per_second_slow": demand.rate_slow,
        "seconds_per_request": demand.seconds_per_item,
        "waiting_in_queue": demand.ready,
        "held_by_workers": demand.held,
        "load_seconds": facts.load_seconds,
        "seconds_since_asked": max(view.at - demand.last_active, 0.0),
        "seconds_with_a_copy_too_many": (
            None if facts.low_since is None else view.at - facts.low_since
        ),
    }


def _seat(view: View, knowledge: Knowledge, worker: str, model: ModelId) -> dict[str, Any] | None:
    """One model on one worker; None when it has nothing to do with it."""
    binding = view.workers[worker].assigned.get(model)
    report = knowledge.reported.get(worker, {}).get(model)
    if binding is None and report is None:
        return None
    return {
        "worker": worker,
        "model": model,
        "assigned": binding is not None,
        "reason": None if binding is None else binding.reason,
        "spare": binding is not None and binding.spare,
        "assigned_for_s": None if binding is None else view.at - binding.since,
        "tier": "disk" if report is None else report.tier,
        "phase": "absent" if report is None else report.phase,
        "bound": report is not None and report.bound,
        "bytes": 0 if report is None else report.footprint.weights_bytes,
        "own_bytes": 0 if report is None else _own(report.footprint),
        "shared_bytes": 0 if report is None else _shared(report.footprint),
        "workspace_bytes": 0 if report is None else report.footprint.workspace_bytes,
        "measured": report is not None and report.footprint.measured,
        "held": 0 if report is None else report.held,
        "answered": 0 if report is None else report.answered,
        "error": None if report is None else report.error,
    }


def _own(footprint: Footprint) -> int:
    return footprint.weights_bytes - _shared(footprint)


def _shared(footprint: Footprint) -> int:
    """Of its weights, what counts once on a worker however many have it."""
    return sum(share.nbytes for share in footprint.shares)


def _event(event: Event) -> dict[str, Any]:
    return {
        "at": event.at,
        "what": event.what,
        "model": event.model or None,
        "worker": event.worker or None,
        "why": event.why or None,
    }
