"""Why no worker takes one more copy of a model: the "no" of the one that comes closest."""

from __future__ import annotations

import numpy as np

from services.placer.core.columns import Floats, Ints
from services.placer.core.fleet import Fleet
from services.placer.core.labels import Labels
from services.placer.core.refused import Refused
from services.placer.core.view import ModelView
from shared.fit import Refusal, fit, fit_tiers

_LOOKED_INTO = 16
"""Candidates of which the memory is looked into: those with the most room."""


def refuse(
    fleet: Fleet,
    labels: Labels,
    facts: ModelView,
    score: Floats,
    most: Ints | int,
    *,
    held_back: bool,
) -> Refused:
    """`score`: by worker, inf where it cannot be. `most`: bytes that the model may take, by
    worker or everywhere. `held_back`: some could have it, and have loaded enough lately."""
    model = facts.model
    if not fleet.workers:
        return Refused(model, Refusal("no worker is there"), "no_worker")
    matching = labels.matches(facts)
    able = list(range(len(fleet.workers)))
    if matching is not None:
        able = np.flatnonzero(matching).tolist()
    if not able:
        asked = ",".join(f"{k}={v}" for k, v in facts.placement.worker_selector.items())
        nobody = Refusal(f"none of {len(fleet.workers)} workers has the labels {asked}")
        return Refused(model, nobody, "no_match", permanent=not fleet.holders(model))
    too_large = _too_large(fleet, facts, able, most)
    failed = [worker for worker in able if model in fleet.workers[worker].failed]
    if len(too_large.keys() | set(failed)) == len(able) and not fleet.holders(model):
        suspects = [worker for worker in failed if model in fleet.workers[worker].suspects]
        if suspects:
            why = fleet.workers[suspects[0]].failed[model]
            return Refused(model, Refusal(why), "suspected")
        if failed:
            error = fleet.workers[failed[0]].failed[model]
            told = Refusal(f"it failed to load: {error}")
            return Refused(model, told, "failed_to_load", permanent=True, code="model_failed")
        largest = max(too_large.values(), key=lambda no: no.free_bytes)
        return Refused(model, largest, "too_large", permanent=True)
    closest = _closest(fleet, facts, score)
    if closest is not None:
        hopeless = closest in too_large.values()
        return Refused(model, closest, "too_large" if hopeless else "no_room")
    if not fleet.takes[able].any():
        nobody = Refusal("every worker is leaving or without its engine")
        return Refused(model, nobody, "leaving")
    if held_back:
        policy = fleet.policy
        share = policy.load_share * policy.load_window_s
        least = float(fleet.copied[able].min())
        told = Refusal(
            f"every worker that can take it has loaded for {share:.1f} s or more lately, of "
            f"{policy.load_window_s:g} s; the least {least:.1f} s"
        )
        return Refused(model, told, "loading")
    crowded = set(labels.crowded(facts)) - set(fleet.holders(model))
    if crowded.intersection(able):
        label = facts.placement.spread_by
        told = Refusal(f"every worker that can take it shares its {label} with a copy")
        return Refused(model, told, "spread")
    return Refused(model, Refusal("every worker that can take it has it already"), "has_all")


def _too_large(
    fleet: Fleet, facts: ModelView, able: list[int], most: Ints | int
) -> dict[int, Refusal]:
    """Of these workers those whose whole device is too small."""
    found: dict[int, Refusal] = {}
    perhaps = most > fleet.budget
    for worker in able:
        if not perhaps[worker]:
            continue
        budget = fleet.workers[worker].budget_bytes
        no = fit(fleet.size_on(worker, facts.model), (), budget) if budget > 0 else None
        if no is not None:
            found[worker] = no
    return found


def _closest(fleet: Fleet, facts: ModelView, score: Floats) -> Refusal | None:
    """The "no" of the candidate that has most room."""
    candidates = np.flatnonzero(np.isfinite(score))
    if len(candidates) > _LOOKED_INTO:
        room = (fleet.free() + fleet.host)[candidates]
        candidates = candidates[np.argpartition(-room, _LOOKED_INTO)[:_LOOKED_INTO]]
    closest: Refusal | None = None
    for worker in candidates[np.argsort(score[candidates], kind="stable")].tolist():
        seen = fleet.workers[worker]
        size, held = fleet.size_on(worker, facts.model), fleet.sizes(worker).values()
        no = fit_tiers(size, held, seen.budget_bytes, seen.host_bytes)
        if no is not None and (closest is None or no.free_bytes > closest.free_bytes):
            closest = no
    return closest
