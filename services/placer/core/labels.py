"""Where a model may be by the labels of workers (`shared.models.Placement`)."""

from __future__ import annotations

import numpy as np

from services.placer.core.columns import Bools
from services.placer.core.fleet import Fleet
from services.placer.core.view import ModelView


class Labels:
    """Of one fleet, whose changes it sees."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._matching: dict[tuple[str, str], Bools] = {}
        self._domains: dict[str, list[str]] = {}

    def __repr__(self) -> str:
        return f"<Labels of {len(self.fleet.workers)} workers>"

    def matches(self, facts: ModelView) -> Bools | None:
        """Workers with the labels that the model asks for; None: it asks for none."""
        found: Bools | None = None
        for item in facts.placement.worker_selector.items():
            having = self._matching.get(item)
            if having is None:
                label, value = item
                workers = self.fleet.workers
                having = np.array([each.labels.get(label) == value for each in workers], bool)
                self._matching[item] = having
            found = having if found is None else found & having
        return found

    def domain(self, label: str, worker: int) -> str:
        """The worker's value of the label. One without it is a domain of its own."""
        values = self._domains.get(label)
        if values is None:
            values = self._domains[label] = [
                each.labels.get(label, f"\0{each.worker}") for each in self.fleet.workers
            ]
        return values[worker]

    def crowded(self, facts: ModelView) -> list[int]:
        """Workers that have the same value of the label by which the model is spread as one
        that serves a copy."""
        label = facts.placement.spread_by
        if label is None:
            return []
        fleet = self.fleet
        taken = {self.domain(label, w) for w in fleet.holders(facts.model) if fleet.serves[w]}
        return [w for w in range(len(fleet.workers)) if self.domain(label, w) in taken]
