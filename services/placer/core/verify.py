"""The plan, checked against a fresher view than it was made on, right before it is applied.

Refuses only what fails: a worker that is gone, a model that is asked again, room that was
taken meanwhile. What is refused is planned anew in the next cycle."""

from __future__ import annotations

import msgspec

from services.placer.core.fleet import Refused
from services.placer.core.plan import Plan, is_asked
from services.placer.core.view import View, footprint, residents
from shared.fit import Refusal, fit_tiers
from shared.names import ModelId


def verify(plan: Plan, view: View) -> tuple[Plan, tuple[Refused, ...]]:
    """What of the plan can be applied to `view`, and what not, with the reasons."""
    refused: list[Refused] = []
    assigned = {name: set(worker.assigned) for name, worker in view.workers.items()}

    def busy(model: ModelId) -> bool:
        facts = view.models.get(model)
        return facts is not None and is_asked(facts)

    unbind = []
    for gone in plan.unbind:
        if gone.model not in assigned.get(gone.worker, ()):
            continue
        if gone.idle and busy(gone.model):
            refused.append(Refused(gone.model, Refusal("it is asked again"), "overtaken"))
            continue
        assigned[gone.worker].discard(gone.model)
        unbind.append(gone)

    bind = []
    for new in plan.bind:
        no = _refuse(view, assigned, new.model, new.worker)
        if no is not None:
            refused.append(Refused(new.model, no, "overtaken"))
            continue
        assigned[new.worker].add(new.model)
        bind.append(new)

    held = {model for models in assigned.values() for model in models}
    retire = tuple(
        gone
        for gone in plan.retire
        if gone.model not in held and (gone.code is not None or not busy(gone.model))
    )
    kept = msgspec.structs.replace(plan, bind=tuple(bind), unbind=tuple(unbind), retire=retire)
    return kept, tuple(refused)


def _refuse(
    view: View, assigned: dict[str, set[ModelId]], model: ModelId, name: str
) -> Refusal | None:
    worker = view.workers.get(name)
    facts = view.models.get(model)
    if worker is None:
        return Refusal(f"worker {name} is gone")
    if facts is None:
        return Refusal("the model is not active any more")
    if not worker.takes_new:
        return Refusal(f"worker {name} is leaving or without its engine")
    if model in assigned[name]:
        return Refusal(f"worker {name} has it already")
    held = sum(model in assigned[other] for other, seen in view.workers.items() if seen.serves)
    if held >= facts.copies_limit(sum(seen.serves for seen in view.workers.values())):
        return Refusal("it has all the copies it may have")
    return fit_tiers(
        footprint(worker, model, facts),
        residents(worker, assigned[name], view.models),
        worker.budget_bytes,
        worker.host_bytes,
    )
