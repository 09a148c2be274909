"""What was delivered and is not settled yet, by item and by model.

Laws: every item is answered once, and settled after that; what is held stays under `max_bytes`, but
for what was on its way when that was reached.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.worker.core.batch import Entry
from services.worker.core.events import Action, Answer, Bury, GiveBack, Item, Refuse
from services.worker.core.state import WorkerState
from shared.names import ModelId


class Held:
    def __init__(self, state: WorkerState, max_bytes: int) -> None:
        self.bytes = 0
        self.paused: set[ModelId] = set()
        """Models that consume nothing until half of the bytes are free again."""
        self._state = state
        self._max_bytes = max_bytes
        self._items: dict[int, Item] = {}
        self._unanswered: set[int] = set()

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"Held({len(self)} with {self.bytes:,} bytes, {len(self.paused)} models paused)"

    def get(self, id_: int) -> Item | None:
        """None when it was settled."""
        return self._items.get(id_)

    def arrived(self, item: Item, now: float) -> bool:
        """True when that is too much: its model is paused."""
        model = self._state.get(item.model)
        model.arrived += 1
        model.held += 1
        model.unanswered += 1
        model.last_used = now
        self._items[item.item] = item
        self._unanswered.add(item.item)
        self.bytes += item.nbytes
        if self.bytes <= self._max_bytes:
            return False
        self.paused.add(item.model)
        return True

    def answered(self, actions: Iterable[Action], now: float) -> None:
        """Keeps count: an item is done, for the core, once an action has said what becomes of
        it. What the effects make of that is told by `ItemSettled`."""
        for action in actions:
            match action:
                case Answer():
                    done = action.items
                case Refuse() | GiveBack() | Bury():
                    done = (action.item,)
                case _:
                    continue
            for id_ in done:
                self._unanswered.remove(id_)
                model = self._state.get(self._items[id_].model)
                model.unanswered -= 1
                if not isinstance(action, GiveBack):
                    model.answered += 1
                    model.last_used = now

    def settled(self, id_: int) -> Item | None:
        """The item, unless it was settled before."""
        item = self._items.pop(id_, None)
        if item is not None:
            self.bytes -= item.nbytes
            self._state.get(item.model).held -= 1
        return item

    def resume(self) -> bool:
        """True when what was paused is so no more."""
        if not self.paused or self.bytes > self._max_bytes // 2:
            return False
        self.paused.clear()
        return True

    def excess(self, entries: list[Entry]) -> list[Entry]:
        """Of what waits for a paused model only what is above the bound, newest first, so that
        what it keeps makes progress."""
        excess, chosen = self.bytes - self._max_bytes, []
        for entry in reversed(entries):
            if excess <= 0:
                break
            chosen.append(entry)
            excess -= entry.item.nbytes
        return chosen

    def validate(self, places: list[int]) -> None:
        """`places`: of every item that is not answered, wherever it is. Raises `AssertionError`
        where a law does not hold."""
        assert len(places) == len(set(places)), f"an item is in two places: {self}"
        assert set(places) == self._unanswered, f"an item is lost: {self}"
        assert self._unanswered <= self._items.keys()
        assert self.bytes == sum(item.nbytes for item in self._items.values())
        for model in self._state.models.values():
            held = [item for item in self._items.values() if item.model == model.id]
            assert model.held == len(held), model
            assert model.unanswered == sum(i.item in self._unanswered for i in held), model
