"""Models on their way into the host's memory alone."""

from __future__ import annotations

from collections import deque

from services.worker.engine.opening import Load, in_host
from services.worker.engine.residency import Residency
from services.worker.wire import ModelLoaded
from shared.names import ModelId


class Holds:
    """One after the other, a piece at a time. Nobody waits for them: a model that is wanted on
    the device comes from the disk as well."""

    def __init__(self, residency: Residency[Load]) -> None:
        self._residency = residency
        self._loads: deque[Load] = deque()
        """The first one has begun, and others may have before they were overtaken."""

    def __bool__(self) -> bool:
        return bool(self._loads)

    @property
    def first(self) -> Load:
        return self._loads[0]

    @property
    def models(self) -> frozenset[ModelId]:
        return frozenset(each.model for each in self._loads)

    def add(self, load: Load) -> None:
        self._loads.append(load)

    def remove(self, load: Load) -> None:
        """It is over. Nothing to do for a load that is none of these."""
        if load in self._loads:
            self._loads.remove(load)

    def hurry(self, model: ModelId) -> None:
        """Now somebody waits for it, if it is one of these."""
        for load in self._loads:
            if load.model == model:
                self._loads.remove(load)
                self._loads.appendleft(load)
                return

    def step(self, load: Load) -> ModelLoaded | None:
        """One piece more; its answer when that was the last. Raises `Failed`; what was read of it
        is gone then."""
        if load.shared is None:
            if load.steps is not None:  # it turned out since it began
                load.steps.close()
            return in_host(load)
        if load.steps is None:
            load.steps = self._residency.hold(load.model, load.shared, load.layout, load.file)
        return in_host(load) if next(load.steps, load) is load else None
