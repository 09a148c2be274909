"""What happened, for people: the last events, and where each model was placed last."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from services.placer.core.changes import Bind, Considered, Plan
from shared.names import ModelId

EVENTS_KEPT = 1000


class Event(msgspec.Struct, frozen=True):
    """One thing that happened. `at` is Unix time."""

    at: float
    what: str
    model: str = ""
    worker: str = ""
    why: str = ""


class Placed(msgspec.Struct, frozen=True):
    """A model's last placement: where, why there, and which workers were considered."""

    at: float
    worker: str
    why: str
    considered: tuple[Considered, ...] = ()


class History:
    """Nothing is decided by it."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.placed: dict[ModelId, Placed] = {}
        """The last placement of each active model that this placer has placed."""

    def __repr__(self) -> str:
        return f"<History of {len(self.events)} events>"

    def note(self, what: str, model: str = "", worker: str = "", why: str = "") -> None:
        self.events.append(Event(time.time(), what, model, worker, why))

    def place(self, new: Bind) -> None:
        """A binding that is wanted from now on."""
        self.placed[new.model] = Placed(time.time(), new.worker, new.reason, new.considered)
        self.note("assigned", new.model, new.worker, new.reason)

    def compare(self, before: Plan, plan: Plan) -> None:
        """What this plan says that the one before did not."""
        refused_before = {(no.model, no.refusal.reason) for no in before.refused}
        for no in plan.refused:
            if (no.model, no.refusal.reason) not in refused_before:
                self.note("refused", no.model, why=str(no.refusal))
        if plan.wanted.workers != before.wanted.workers:
            why = "; ".join(plan.wanted.reasons)
            self.note(f"{plan.wanted.workers} workers wanted", why=why)
