"""Which queues are consumed: one subscription per bound model, and old ones that still hold.

    starting → on → stopping → stopped → (nothing held) closed

A subscription that is stopped keeps what it holds until that is settled; meanwhile the model
may already have a new one. Laws: at most one subscription of a model is not stopped; a model
knows how many it has (`Model.consumers`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from services.worker.core.events import Action, CloseConsumer, StartConsumer, StopConsumer
from services.worker.core.state import WorkerState
from shared.models import ModelSpec
from shared.names import ModelId


@dataclass(slots=True)
class Subscription:
    id: int
    model: ModelId
    prefetch: int
    phase: Literal["starting", "on", "stopping", "stopped"] = "starting"
    held: int = 0
    """Requests delivered and not settled."""

    def took(self) -> bool:
        """One more is held. True when the window is full by that, which is news each time, though
        under load it fills up again with nearly every batch: what the placer learns so much
        sooner than by heartbeats is worth the 8 us a request (docs/adr/0019)."""
        self.held += 1
        return self.held == self.prefetch

    @property
    def saturated(self) -> bool:
        return self.held >= self.prefetch


class Subscriptions:
    def __init__(self, state: WorkerState) -> None:
        self.all: dict[int, Subscription] = {}
        self.current: dict[ModelId, Subscription] = {}
        self._state = state
        self._last_id = 0

    def __repr__(self) -> str:
        return f"Subscriptions({len(self.current)} current, {len(self.all)} in all)"

    def bound(self, model: ModelId) -> bool:
        """Whether the queue is consumed: until the end is confirmed, messages still come."""
        subscription = self.current.get(model)
        return subscription is not None and subscription.phase in {"on", "stopping"}

    def saturated(self, model: ModelId) -> bool:
        subscription = self.current.get(model)
        return subscription is not None and subscription.saturated

    def reconcile(self, desired: Iterable[ModelId]) -> list[Action]:
        """Towards one subscription for each desired model, and none for the others."""
        wanted = dict.fromkeys(desired)
        actions: list[Action] = []
        for subscription in self.current.values():
            if subscription.model not in wanted and subscription.phase in {"starting", "on"}:
                subscription.phase = "stopping"
                actions.append(StopConsumer(subscription.id))
        for name in wanted:
            if name not in self.current:
                self._last_id += 1
                model = self._state.get(name)
                model.consumers += 1
                prefetch = prefetch_for(model.manifest or ModelSpec())
                fresh = Subscription(self._last_id, name, prefetch)
                self.current[name] = self.all[fresh.id] = fresh
                actions.append(StartConsumer(fresh.id, name, prefetch))
        return actions

    def started(self, id_: int) -> Subscription | None:
        subscription = self.all.get(id_)
        if subscription is None or subscription.phase != "starting":
            return None
        subscription.phase = "on"
        return subscription

    def stopped(self, id_: int) -> Subscription | None:
        subscription = self.all.get(id_)
        if subscription is None or subscription.phase == "stopped":
            return None
        subscription.phase = "stopped"
        self.current.pop(subscription.model, None)
        return subscription

    def sweep(self) -> list[Action]:
        """Closes what is stopped and holds nothing any more."""
        done = [s for s in self.all.values() if s.phase == "stopped" and not s.held]
        for subscription in done:
            del self.all[subscription.id]
            self._state.get(subscription.model).consumers -= 1
        return [CloseConsumer(subscription.id) for subscription in done]

    def validate(self) -> None:
        for model, subscription in self.current.items():
            assert subscription.phase != "stopped", subscription
            assert subscription.model == model, subscription
            assert self.all.get(subscription.id) is subscription, subscription
        live = [s.model for s in self.all.values() if s.phase != "stopped"]
        assert len(live) == len(set(live)) == len(self.current), self
        for known in self._state.models.values():
            assert known.consumers == sum(s.model == known.id for s in self.all.values()), known


def prefetch_for(spec: ModelSpec) -> int:
    """Two batches: one runs, one waits. More would hide the backlog from the placer and let
    one worker hoard. Wherever the model is: its window lasts as long as it is bound, its place
    changes many times a second, and what it holds where it is not on the device brings it there,
    so that it keeps that from others for no longer than a swap takes. With a window for each
    place it would stay starved once it is hot, or be bound anew at every swap."""
    if spec.stateful:
        return 1
    return min(max(2 * spec.max_batch_size, 2), 64)
