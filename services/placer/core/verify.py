"""The plan, checked against a fresher view than it was made on, right before it is applied.

Refuses only what fails: a worker that is gone, a model that is asked again, room that was
taken meanwhile. What is refused is planned anew in the next cycle."""

from __future__ import annotations

import msgspec

from services.placer.core.changes import Plan
from services.placer.core.choose import Chooser
from services.placer.core.fleet import Fleet, is_asked
from services.placer.core.policy import Policy
from services.placer.core.refused import Refused
from services.placer.core.view import Binding, View
from shared.fit import Refusal
from shared.names import ModelId


def verify(plan: Plan, view: View) -> tuple[Plan, tuple[Refused, ...]]:
    """What of the plan can be applied to `view`, and what not, with the reasons."""
    if not plan.changes:
        return plan, ()
    refused: list[Refused] = []
    fleet = Fleet(view, Policy())
    chooser = Chooser(fleet)

    def busy(model: ModelId) -> bool:
        facts = view.models.get(model)
        return facts is not None and is_asked(facts)

    unbind = []
    for gone in plan.unbind:
        worker = fleet.number.get(gone.worker)
        if worker is None or gone.model not in fleet.assigned(worker):
            continue
        if gone.idle and busy(gone.model):
            refused.append(Refused(gone.model, Refusal("it is asked again"), "overtaken"))
            continue
        fleet.remove(gone.model, worker)
        unbind.append(gone)

    bind = []
    for new in plan.bind:
        no = _refuse(chooser, new.model, new.worker)
        if no is not None:
            refused.append(Refused(new.model, no, "overtaken"))
            continue
        fleet.add(new.model, fleet.number[new.worker], Binding(view.at))
        bind.append(new)

    retire = tuple(
        gone
        for gone in plan.retire
        if not fleet.holders(gone.model) and (gone.code is not None or not busy(gone.model))
    )
    kept = msgspec.structs.replace(plan, bind=tuple(bind), unbind=tuple(unbind), retire=retire)
    return kept, tuple(refused)


def _refuse(chooser: Chooser, model: ModelId, name: str) -> Refusal | None:
    fleet = chooser.fleet
    worker, facts = fleet.number.get(name), fleet.view.models.get(model)
    if worker is None:
        return Refusal(f"worker {name} is gone")
    if facts is None:
        return Refusal("the model is not active any more")
    if not fleet.takes[worker]:
        return Refusal(f"worker {name} is leaving or without its engine")
    if model in fleet.assigned(worker):
        return Refusal(f"worker {name} has it already")
    if fleet.copies(model) >= facts.copies_limit(fleet.serving):
        return Refusal("it has all the copies it may have")
    matching = chooser.labels.matches(facts)
    if matching is not None and not matching[worker]:
        return Refusal(f"worker {name} has not the labels that it asks for")
    if worker in chooser.labels.crowded(facts):
        return Refusal(f"worker {name} shares its {facts.placement.spread_by} with a copy")
    return chooser.fits(facts, worker)
