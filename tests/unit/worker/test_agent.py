"""What the agent does in the background."""

from __future__ import annotations

import asyncio
import threading

from services.worker.agent import Agent
from services.worker.core.events import FetchModel
from services.worker.core.worker import WorkerCore
from services.worker.metrics import Metrics
from shared.names import ModelId


class SlowRepository:
    """Its answers come when `go` is set."""

    def __init__(self) -> None:
        self.versions = self
        self.asked, self.go = threading.Event(), threading.Event()

    def manifest(self, *_):
        self.asked.set()
        self.go.wait()
        raise OSError("too late")


async def test_a_fetch_that_takes_for_ever_does_not_hold_up_the_end():
    """Nobody waits for the file any more; its thread ends with the process."""
    repository = SlowRepository()
    agent = Agent(WorkerCore(), repository, "cache", Metrics("w"))
    agent._act(FetchModel(ModelId("m/1")))
    while not repository.asked.is_set():
        await asyncio.sleep(0.001)
    async with asyncio.timeout(5):
        await agent.finish(0.01)
        while agent._tasks:
            await asyncio.sleep(0.001)
    (left,) = [each for each in threading.enumerate() if each.name == "fetch m/1"]
    assert left.daemon
    repository.go.set()
    left.join(5)
