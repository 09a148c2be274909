"""Of which active models something may wait in the queue.

Law: whatever is active and has a depth, or was put into its queue while nobody consumed it
(`Active.waiting_at`), is among them, so that a look costs what waits, not what is active.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from services.placer.core.demand import DemandTracker
from services.placer.picture import Active
from shared.names import ModelId


class Waiting:
    """See the module's text."""

    def __init__(self, active: Mapping[ModelId, Active], tracker: DemandTracker) -> None:
        """`active` is the owner's own, and followed."""
        self._active = active
        self._tracker = tracker
        self._models: set[ModelId] = set()

    def __repr__(self) -> str:
        return f"<Waiting {len(self._models)} models>"

    def look_at(self, model: ModelId) -> None:
        """The model is active from now on; what is in its queue is not known, or was not looked
        after."""
        self._models.add(model)

    def put(self, model: ModelId, now: float) -> None:
        """A request was put into the active model's queue, and nobody consumes it."""
        self._active[model].waiting_at = now
        self._models.add(model)

    def see(self, depths: Mapping[ModelId, int], asked_at: float, now: float) -> None:
        """What waits in these models' queues, as asked for at `asked_at` or later."""
        for model, depth in depths.items():
            active = self._active.get(model)
            if active is None:
                continue
            active.depth = depth
            if depth:
                self._models.add(model)
                self._tracker.touch(model, now)
                if active.backlog_since is None:
                    active.backlog_since = asked_at
                continue
            active.backlog_since = None
            if active.waiting_at is not None and active.waiting_at < asked_at:
                active.waiting_at = None

    def consumed(self, models: Container[ModelId]) -> None:
        """Somebody consumes these now."""
        for model in self._models:
            active = self._active.get(model) if model in models else None
            if active is not None:
                active.waiting_at = None

    def asked(self) -> dict[ModelId, Active]:
        """Those of which something waits, as far as is known; the others are forgotten."""
        for model in list(self._models):
            active = self._active.get(model)
            if active is None or not (active.depth or active.waiting_at is not None):
                self._models.remove(model)
        return {model: self._active[model] for model in self._models}
