"""What goes back, because it cannot run here: another worker may take it. What kills engines is
refused instead."""

from __future__ import annotations

from services.worker.core.batch import Entry
from services.worker.core.consumers import Subscription
from services.worker.core.dispatch import Dispatch
from services.worker.core.events import Action, Fault, GiveBack, Item, Refuse
from services.worker.core.held import Held
from services.worker.core.model import Model
from services.worker.core.state import WorkerState
from shared.names import ModelId


class Returns:
    def __init__(self, state: WorkerState, dispatch: Dispatch, held: Held) -> None:
        self._state = state
        self._dispatch = dispatch
        self._held = held

    def unbound(self, subscription: Subscription) -> list[Action]:
        """What a stopped subscription gives back: all that waits, but for what must be tried
        here again, alone; a paused one only as much as must be."""
        mine = [
            entry
            for entry in self._dispatch.waiting(subscription.model)
            if entry.item.subscription == subscription.id and not entry.suspect
        ]
        if subscription.model in self._held.paused:
            mine = self._held.excess(mine)
        return self._give_back(subscription.model, mine, "unbound")

    def let_go(self, *, ending: bool) -> list[Action]:
        """Gives back what waits for a model that is not coming (again): another worker may
        run it, unless the model kills engines. While a model is being loaded again, its
        suspects wait for that."""
        actions: list[Action] = []
        for name in self._dispatch.models_waiting():
            model = self._state.get(name)
            coming = name in self._state.wanted and not ending and model.error is None
            if model.stage != "ready" and not coming:
                entries = list(self._dispatch.waiting(name))
                back = self._give_back(name, entries, model.error or "the model is no longer here")
                if model.quarantined:
                    back = [refusal(model, entry.item) for entry in entries]
                actions += back
        return actions

    def _give_back(self, model: ModelId, entries: list[Entry], reason: str) -> list[Action]:
        if entries:
            self._dispatch.take_out(model, entries)
        return [GiveBack(entry.item.item, reason) for entry in entries]


def refusal(model: Model, item: Item) -> Refuse:
    """Of an item that asks for a quarantined model."""
    return Refuse(item.item, Fault("quarantined", f"{model.id} is {model.quarantined}"))
