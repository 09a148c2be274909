"""Who makes room, on the device and in the host's memory. Laws, besides those of state.py:

- Off the device goes first what nobody wants and nothing hangs on; then, with a host tier, what
  has nothing to do, the least recently used first (and what has no copy only after a time as many
  times longer as the disk is slower: else each swap throws away what the next one must read); then
  what was chosen before, as long as it may leave: of several that are always busy each would else
  get batches while another one waits for its end; then what is due last. What has just come in for
  an item stays until it had its batch: so nothing goes to and fro for nothing.
- Copies in the host's memory make room for copies: of what nobody wants first those that stand
  on the device as well, since nothing is lost by them now, and of these the most recently used
  first, since that stays on the device longest; then the least recently used of the others.
  Copies of what is wanted go only so that another wanted model can be held at all, and only those
  of what is on the device: a model there does not need its copy now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from typing import NamedTuple

from services.worker.core.events import Action, TellPlacer
from services.worker.core.model import Model, by_last_use
from services.worker.core.state import WorkerState
from shared.fit import fit
from shared.models import Footprint
from shared.names import ModelId

_INSTANT_S = 1e-6


class Activity(NamedTuple):
    """What a model on the device has to do."""

    due: float
    """Of the most urgent item that waits for it; infinite when none does."""
    running: bool
    """A batch of it is under way."""

    @property
    def idle(self) -> bool:
        return self.due == inf and not self.running


Watch = Callable[[Model], Activity]


def leavers(state: WorkerState, watch: Watch, due_after: float, now: float) -> Iterator[ModelId]:
    """What may leave the device for something that is due at `due_after`, first what is missed
    least. What has a batch under way is among them: it can leave when that has ended."""
    forgotten: list[Model] = []
    resting: list[Model] = []
    busy: list[tuple[bool, float, tuple[float, ModelId], ModelId]] = []
    for model in state.ready():
        wanted = model.id in state.wanted
        if not (wanted or model.consumers or model.unanswered):
            forgotten.append(model)
            continue
        if not state.swapping or (wanted and model.pinned):
            continue
        if model.unanswered and not (activity := watch(model)).idle:
            if model.ran and activity.due > due_after:
                chosen = model.id in state.chosen
                busy.append((not chosen, -activity.due, by_last_use(model), model.id))
        else:
            resting.append(model)
    yield from (model.id for model in sorted(forgotten, key=by_last_use))
    by_regret = partial(_regret, now=now)
    yield from (model.id for model in sorted(resting, key=by_regret))
    yield from (name for *_, name in sorted(busy))


def _regret(model: Model, now: float) -> tuple[float, float, ModelId]:
    """How much it is missed, over what one with a copy that was just used would be: by how often
    it is asked, for which the time since it was used stands, and what bringing it back takes."""
    return model.farness / max(now - model.last_used, _INSTANT_S), model.last_used, model.id


def make_way(
    state: WorkerState, newcomer: Footprint | None, watch: Watch, due_after: float, now: float
) -> list[ModelId] | None:
    """Who is to be evicted now so that the newcomer fits (for None: so that the rest does). None
    when it cannot have its room now; those that have to leave for it get no more batches."""
    victims = state.device.victims(newcomer, leavers(state, watch, due_after, now))
    if victims is None:
        return None
    if any(watch(state.get(name)).running for name in victims):
        state.leaving.update(victims)  # those that are done as well: they wait for the others
        return None
    return victims


def make_way_for_copy(
    state: WorkerState, model: Model, *, at_any_cost: bool
) -> list[Action] | None:
    """What must go so that a copy of the model can be in the host's memory; None when it cannot.
    `at_any_cost`: it has no other place to be."""
    if model.as_copy is None or model.copy == "going":
        return None
    if model.in_host:
        return []
    held = [m for m in map(state.get, state.host) if m.copy == "held" and m.stage != "loading"]
    doubles = sorted((m for m in held if m.stage == "ready"), key=by_last_use, reverse=True)
    candidates = [m for m in doubles if m.id not in state.wanted]
    single = (m for m in held if m.stage != "ready" and m.id not in state.wanted)
    candidates += sorted(single, key=by_last_use)
    if at_any_cost:
        candidates += [m for m in doubles if m.id in state.wanted]
    victims = state.host.victims(model.as_copy, [m.id for m in candidates])
    if victims is None:
        return None
    return [state.drop_copy(state.get(victim)) for victim in victims]


def shrink(state: WorkerState, watch: Watch, now: float) -> list[Action]:
    """Makes the device fit its budget again after a measurement: last of all goes what is wanted
    and has no consumer yet, and says so."""
    fresh = [m.id for m in reversed(state.ready()) if not m.consumers and not m.unanswered]
    victims = make_way(state, None, watch, -inf, now)
    if victims is None and not state.leaving:
        candidates = dict.fromkeys([*leavers(state, watch, -inf, now), *fresh])
        at_once = [name for name in candidates if not watch(state.get(name)).running]
        victims = state.device.victims(None, at_once)
        victims = at_once if victims is None else victims
    actions: list[Action] = []
    for victim in map(state.get, victims or ()):
        actions.append(state.evict(victim))
        if victim.id in state.wanted and (not state.swapping or victim.pinned):
            refusal = fit(victim.footprint, state.device.footprints(), state.device.budget_bytes)
            state.claims.release(victim)
            victim.error = str(refusal) if refusal else "measured larger than its estimate"
            actions.append(TellPlacer(f"{victim.id}: {victim.error}"))
    return actions
