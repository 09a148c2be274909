"""What is asked comes in: a model in the host's memory for which items wait is swapped in.

Laws:
- The most urgent first, by the due time of the item at the head of its queue. Nothing that is less
  urgent takes room that it waits for.
- It takes the place of what has nothing to do; else of what is due only after the newcomer could
  have run. That gets no more batches, and leaves when those under way have ended.
- Between tenants: where others had the device for as long as bringing it in takes, while the most
  urgent of a tenant's missing ones waited, that one comes first, and what others ask for may wait
  for it, however long it has been due (turns.py).
- So nothing starves: what arrives later than an item was due is due later, and makes room for it.
- Several are on their way at once, so that copies follow each other without a pause; one fewer
  while something that is not served yet waits for that (placing.py).
"""

from __future__ import annotations

from collections.abc import Callable

from services.worker.core.events import Action
from services.worker.core.model import Model
from services.worker.core.placing import load_to_device
from services.worker.core.state import WorkerState
from services.worker.core.victims import Watch, make_way

Missing = list[tuple[float, Model]]
"""Models that are not on the device, each with the due time of the first item that waits: the
most urgent first."""


def can_be_swapped_in(state: WorkerState, model: Model) -> bool:
    """It is on its way nowhere, and nothing stands against it."""
    return (
        model.stage == "absent"
        and model.manifest is not None
        and model.id in state.wanted
        and model.error is None
    )


def swap_in(
    state: WorkerState,
    missing: Missing,
    now: float,
    watch_for: Callable[[Model], Watch],
    *,
    batches_running: bool,
) -> list[Action]:
    """As many of the missing as can come now. `watch_for`: what others have to do, as far as it
    counts against this newcomer."""
    actions: list[Action] = []
    slots = state.max_loading - state.kept_out
    for due, model in missing:
        if not state.may_load(slots):
            break
        refusal = state.claims.admit(model)
        if refusal is not None:
            actions += state.claims.refuse(model, refusal)
            continue
        due_after = due + model.seconds_to_come
        victims = make_way(state, model.footprint, watch_for(model), due_after, now)
        if victims is None:
            break
        if model.suspect and (batches_running or state.loading()):
            state.quiesce = True
            break
        actions += load_to_device(state, model, victims, now)
    return actions
