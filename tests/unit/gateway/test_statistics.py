from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from services.gateway import statistics
from services.gateway.core.tally import Tallies
from services.gateway.statistics import Statistics
from shared.names import ModelId
from shared.store.memory import MemoryState, MemoryStore

M = ModelId("m/1")


class Everything:
    """A catalog of many models, and a status that knows nothing of them."""

    async def ids(self):
        return [SimpleNamespace(id=f"m{n}/1", name=f"m{n}", version=1) for n in range(1000)]

    async def memory(self):
        return {}


@pytest.fixture
def made():
    state, tallies, everything = MemoryState(), Tallies(), Everything()
    return state, Statistics(tallies, everything, MemoryStore(state), everything, "g")


async def test_a_store_that_forgot_is_told_again(made, monkeypatch):
    """Also of models that nobody asks any more, and of each only so often."""
    monkeypatch.setattr(statistics, "TELL_S", 0.001)
    monkeypatch.setattr(statistics, "_RENEW_S", 0.02)
    state, told = made
    told.note(M, 0.1, None)
    task = asyncio.create_task(told.tell_others())
    try:
        async with asyncio.timeout(10):
            for _ in range(2):
                while M not in state.tallies.get("g", (0.0, {}))[1]:
                    await asyncio.sleep(0.001)
                state.flush()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_statistics_of_many_models_let_others_run(made):
    """Ten thousand take half a second of computing: not in one piece."""
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await asyncio.sleep(0)
    before = turns
    assert len((await made[1].of_all())["model_stats"]) == 1000
    assert turns - before >= 3
    task.cancel()
