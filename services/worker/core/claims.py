"""Which of the wanted models have their place on this worker: all that can be served together."""

from __future__ import annotations

from collections.abc import Iterator

from services.worker.core.events import Action, TellPlacer
from services.worker.core.model import Model
from shared.fit import Refusal, fit_tiers, used_bytes
from shared.models import Footprint
from shared.names import ModelId


class Claims:
    """By the very function that the placer assigns by."""

    def __init__(self) -> None:
        self.budgets = (0, 0)
        """Bytes of the device, and of the host's memory."""
        self.version = 0
        """Another one after each change."""
        self._claimed: dict[ModelId, Footprint] = {}
        self._pinned: dict[ModelId, Footprint] = {}
        """Those that never leave the device."""

    def __repr__(self) -> str:
        return f"Claims({len(self._claimed)} for {self.budgets})"

    def __iter__(self) -> Iterator[ModelId]:
        return iter(list(self._claimed))

    def admit(self, model: Model) -> Refusal | None:
        """Whether it has its place beside all that is admitted, which it then takes."""
        if model.served and self._still_possible(model.id):
            return None
        others = [each for name, each in self._claimed.items() if name != model.id]
        refusal = fit_tiers(model.footprint, others, *self.budgets)
        if refusal is None:
            self.take(model)
        return refusal

    def refuse(self, model: Model, refusal: Refusal) -> list[Action]:
        """It need not be asked about again before `version` is another one."""
        self.release(model)
        model.refused_at, before = self.version, model.error
        model.error = str(refusal)
        return [] if model.error == before else [TellPlacer(f"{model.id}: {refusal}")]

    def take(self, model: Model) -> None:
        """It has its place, or takes another amount now."""
        model.admitted, footprint = True, model.footprint
        if self._claimed.get(model.id) != footprint:
            self._claimed[model.id] = footprint
            if footprint.pinned:
                self._pinned[model.id] = footprint
            else:
                self._pinned.pop(model.id, None)
            self.version += 1

    def release(self, model: Model) -> None:
        model.admitted = model.served = False
        self._pinned.pop(model.id, None)
        if self._claimed.pop(model.id, None) is not None:
            self.version += 1

    def _still_possible(self, model: ModelId) -> bool:
        """Whether what was served fits the device, beside what never leaves it: measurements may
        have grown since. Without a host tier all is there together, and has its room."""
        device_bytes, host_bytes = self.budgets
        if not host_bytes:
            return True
        least = self._pinned | {model: self._claimed[model]}
        return used_bytes(least.values()) <= device_bytes
