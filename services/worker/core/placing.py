"""What is wanted comes in, asked or not: onto the device while there is room, else into the
host's memory, from where it is swapped in (swaps.py).

Laws, besides those of state.py:
- What is not served yet comes before what lacks only its copy, each in the placer's order. It
  gets the next load that ends, whatever is asked of others (`WorkerState.kept_out`): so nothing
  that can be admitted stays outside because others come and go.
- What comes from the disk leaves a copy in the host's memory where there is room for it, so that
  it is back in the time of a copy once it had to leave the device.
- What was brought in once comes onto the device again only when it is asked for: for want of a
  copy it would else be loaded from the disk whenever there is room, and leave at the next swap.
- Nothing that is wanted leaves the device for what nobody asks for, but for a model that keeps a
  state: that serves from there alone.
- What is admitted and finds no room in the host's memory either is served all the same: it comes
  from the disk each time that it is asked for.
"""

from __future__ import annotations

from math import inf

from services.worker.core.events import Action
from services.worker.core.model import Model
from services.worker.core.state import WorkerState
from services.worker.core.victims import Watch, make_way, make_way_for_copy, shrink
from shared.names import ModelId


def place(
    state: WorkerState,
    now: float,
    watch: Watch,
    *,
    batches_running: bool,
    may_load: bool,
    slots: int,
) -> list[Action]:
    """Towards having every wanted model where it should be, with at most `slots` loads under
    way for what is served already. Called after whatever changed that, and at `next_retry`."""
    if not state.engine_up or state.condemned:
        return []
    # 1. What is wanted and not known is fetched, whatever the room: that costs no device.
    unknown = [model for model in state.waiting(now) if model.manifest is None]
    actions: list[Action] = [state.fetch(model) for model in unknown]
    # 2. What was measured too large gives way first.
    if state.overrun:
        actions += shrink(state, watch, now)
    # 3. Then the wanted ones come in as there is room: first what is not served yet.
    state.kept_out = False
    for model in sorted(state.waiting(now), key=_is_served):
        if not may_load or not state.may_load(slots if model.served else state.max_loading):
            state.kept_out = may_load and not model.served
            break
        if model.refused_at == state.claims.version:
            continue
        refusal = state.claims.admit(model)
        if refusal is not None:
            actions += state.claims.refuse(model, refusal)
            continue
        if model.suspect and (batches_running or state.loading()):
            state.quiesce = True
            break
        brought = _bring(state, model, now, watch)
        if brought is None:
            break  # its room is on the way: nobody behind it takes that
        actions += brought
    state.incomplete = bool(state.waiting(now))
    return actions


def load_to_device(
    state: WorkerState, model: Model, victims: list[ModelId], now: float
) -> list[Action]:
    """In the place of these."""
    actions: list[Action] = [state.evict(state.get(victim)) for victim in victims]
    drops = make_way_for_copy(state, model, at_any_cost=False) if state.swapping else None
    actions += drops or []
    return [*actions, state.load(model, now, tier="device", keep=drops is not None)]


def _bring(state: WorkerState, model: Model, now: float, watch: Watch) -> list[Action] | None:
    """None: it comes, but not yet."""
    if model.eager or not (model.served and state.swapping):
        victims = state.device.victims(model.footprint, (m.id for m in state.idle()))
        if victims is not None:
            return load_to_device(state, model, victims, now)
    if not state.swapping:
        return None  # what is unbound now still finishes its items
    if model.pinned:
        victims = make_way(state, model.footprint, watch, -inf, now)
        return None if victims is None else load_to_device(state, model, victims, now)
    # Room that is being given up by what nobody wants any more is worth coming back for.
    unwanted = [m.id for m in state.ready() if m.id not in state.wanted]
    model.eager = model.eager and state.device.fits(model.footprint, unwanted)
    drops = make_way_for_copy(state, model, at_any_cost=True)
    if drops is not None and not model.in_host:
        return [*drops, state.load(model, now, tier="host", keep=True)]
    if model.copy != "going":
        model.served, model.error = True, None
    return []


def _is_served(model: Model) -> bool:
    return model.served
