"""The order of commands. Pure.

What concerns one model is done in its own order, and what makes room before what needs it;
otherwise nothing waits. So a command about a model waits while a load of that model is under
way, and a load waits for the evictions that came before it. Only the hold of a model, which is
long and nobody's hurry, keeps no eviction from the device waiting.
"""

from __future__ import annotations

from collections import deque

from services.worker.wire import EvictModel, LoadModel
from shared.names import ModelId

Command = LoadModel | EvictModel


class Orders:
    def __init__(self) -> None:
        self._under_way: dict[ModelId, LoadModel] = {}
        self._deferred: list[Command] = []
        """In the order in which they came; each waits for a load under way, or for another of
        these."""
        self._again: deque[Command] = deque()
        """Deferred ones that may begin now, or else are deferred again. They came before all
        that has not been seen yet."""

    @property
    def idle(self) -> bool:
        return not self._under_way and not self._again

    def admit(self, command: Command) -> bool:
        """Whether it may begin now; otherwise it comes again out of `next`."""
        if self._must_wait(command):
            self._deferred.append(command)
            return False
        return True

    def next(self) -> Command | None:
        """What comes before every new command."""
        return self._again.popleft() if self._again else None

    def begin(self, command: LoadModel) -> None:
        self._under_way[command.model] = command

    def end(self, model: ModelId) -> None:
        """Its load is over: those that waited are asked again."""
        del self._under_way[model]
        # Before those that are still to be asked: they came earlier.
        self._again.extendleft(reversed(self._deferred))
        self._deferred.clear()

    def _must_wait(self, command: Command) -> bool:
        load = self._under_way.get(command.model)
        if load is not None and not (_off_the_device(command) and load.tier == "host"):
            return True
        return any(
            each.model == command.model
            or (isinstance(each, EvictModel) and isinstance(command, LoadModel))
            for each in self._deferred
        )


def _off_the_device(command: Command) -> bool:
    return isinstance(command, EvictModel) and command.tier == "device"
