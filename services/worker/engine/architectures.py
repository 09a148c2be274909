"""The programs that the engine knows: one skeleton for all models of one architecture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from services.worker.engine.programs import Skeleton
from shared.models import Case
from shared.names import ModelId

KEPT_UNUSED: Final = 4
"""Skeletons that stay although no model needs them now: one is wanted again sooner than one
thinks, and costs some megabytes of the host's memory."""
_MOST_CASES: Final = 256
"""Remembered of one program; manifests may ask for ever others."""

L = TypeVar("L")


@dataclass(eq=False)
class Architecture(Generic[L]):
    """One program. `L` is whatever stands for a load that waits for it."""

    key: str
    skeleton: Skeleton | None = None
    constants_bytes: int = 0
    """What the skeleton keeps on the device."""
    unshareable: str | None = None
    """Why each file of it needs a module of its own. Found out once, and remembered."""
    preparing: L | None = None
    """The load that has it parsed and warmed up, while it does."""
    waiting: list[L] = field(default_factory=list)
    """Loads that came meanwhile."""
    models: set[ModelId] = field(default_factory=set)
    """Those on the device or in the host's memory."""
    served: bool = False
    """A model of it has been loaded, so the dispatch thread runs it. Before that it belongs to
    the load that prepares it."""
    cases: dict[Hashable, Case | None] = field(default_factory=dict)
    """What warm-ups of any of its models told, by what was run; None of one that failed."""
    measured_input_bytes: int = 0
    """Inputs of the greatest batch, of any of its models, whose workspace was measured."""
    workspace_bytes: int = 0
    """The greatest that was."""

    @property
    def ready(self) -> bool:
        return self.skeleton is not None and (self.preparing is None or self.served)

    @property
    def used(self) -> bool:
        return bool(self.models or self.waiting) or self.preparing is not None

    def keeps_waiting(self, asked: Iterable[Hashable]) -> bool:
        """Whether a load that asks for these warm-ups waits for the one that prepares it: until
        the program may run, and because that one may measure what this one wants to know."""
        return self.preparing is not None and not (self.ready and self.knows(asked))

    def knows(self, asked: Iterable[Hashable]) -> bool:
        return all(each in self.cases for each in asked)

    def learn(self, cases: Mapping[Hashable, Case | None], input_bytes: int) -> None:
        """What came of warm-ups."""
        self.cases |= cases
        while len(self.cases) > _MOST_CASES:
            del self.cases[next(iter(self.cases))]
        self.remember(input_bytes)

    def remember(self, input_bytes: int, workspace_bytes: int = 0) -> None:
        """The greatest inputs that were measured of one of its models, and what they took."""
        self.measured_input_bytes = max(self.measured_input_bytes, input_bytes)
        self.workspace_bytes = max(self.workspace_bytes, workspace_bytes)


class Architectures(Generic[L]):
    """By key. What happens to them is written into them by the loader."""

    def __init__(self, kept_unused: int = KEPT_UNUSED) -> None:
        self._kept_unused = kept_unused
        self._known: OrderedDict[str, Architecture[L]] = OrderedDict()

    def of(self, key: str) -> Architecture[L]:
        """As it is known, or a new one; from now on the last one that was used."""
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Architecture(key)
        self._known.move_to_end(key)
        return found

    @property
    def constants_bytes(self) -> int:
        """Of all skeletons."""
        return sum(each.constants_bytes for each in self._known.values())

    def forget_unused(self) -> list[Skeleton]:
        """Skeletons for the caller to close: of those that no model needs, the ones that were
        not used for longest. That a program is unshareable costs nothing to remember."""
        unused = [each for each in self._known.values() if not each.used]
        warm = [each for each in unused if each.skeleton is not None]
        surplus = warm[: max(len(warm) - self._kept_unused, 0)]
        for each in unused:
            if each in surplus or (each.skeleton is None and each.unshareable is None):
                del self._known[each.key]
        return [each.skeleton for each in surplus if each.skeleton is not None]
