"""A death that a worker saw is written down, whatever is away."""

from __future__ import annotations

import pytest

from services.worker.core.events import DeathKept, KeepDeath
from services.worker.deaths import Deaths
from shared.errors import Unavailable
from shared.names import ModelId
from shared.quarantine import Death
from shared.store.memory import MemoryState, MemoryStore

MODEL = ModelId("bert/1")
ORDER = KeepDeath(MODEL, "load", "it ended 2 engines as it was loaded")


class Registry:
    """Is away for the first so many times."""

    def __init__(self, away: int) -> None:
        self.away = away
        self.deaths: list[tuple[ModelId, Death]] = []

    def add_death(self, model: ModelId, death: Death) -> None:
        self.away -= 1
        if self.away >= 0:
            raise Unavailable("the repository cannot be used")
        self.deaths.append((model, death))


@pytest.mark.parametrize("away", [0, 1])
@pytest.mark.parametrize("store_is_up", [True, False])
async def test_it_is_tried_until_it_is_written_down(away, store_is_up):
    """Once. The core is told only then; a store that is away changes nothing."""
    registry, told = Registry(away), []
    state = MemoryState()
    state.reachable = store_is_up
    await Deaths(registry, MemoryStore(state), "w7", told.append).keep(ORDER)
    [(model, death)] = registry.deaths
    assert (model, death.kind, death.worker) == (MODEL, "load", "w7")
    assert death.reason == ORDER.reason
    assert told == [DeathKept(MODEL)]
