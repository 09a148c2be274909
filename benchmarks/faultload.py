"""Requests at a rate, whatever happens to the parts, by all ways in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from benchmarks.known import WIDTH, Model
from benchmarks.ledger import Ledger
from benchmarks.ways import Way

SHARES: Final = {"http": 0.68, "amqp": 0.25, "grpc": 0.05, "jobs": 0.02}
_TOGETHER: Final = 8
"""Requests that come at once, for one model by one way: clients are many, and a machine of two
cores bears more of what may travel and run together."""


class Load:
    """Which model is asked is skewed, as in life: the k-th has 1/k of the first's share."""

    def __init__(
        self,
        ways: Sequence[Way],
        models: list[Model],
        rate: float,
        rng: np.random.Generator,
        ledger: Ledger,
        shares: Mapping[str, float] = SHARES,
    ) -> None:
        """`rate`: requests per second; `shares`: of them, by way."""
        self.ledger = ledger
        self._ways = ways
        self._models = models
        self._rate = rate
        self._rng = rng
        self._shares = _normed([shares[way.name] for way in ways])
        self._popularity = _normed([1.0 / (place + 1) for place in range(len(models))])
        self._asking: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, and until the last of what was asked has ended, well or not."""
        for way in self._ways:
            await way.start()
        at = time.perf_counter()
        while not stop.is_set():
            at += float(self._rng.exponential(_TOGETHER / self._rate))
            if (early := at - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            model = self._models[int(self._rng.choice(len(self._models), p=self._popularity))]
            way = self._ways[int(self._rng.choice(len(self._ways), p=self._shares))]
            for x in self._rng.integers(-99, 99, (_TOGETHER, WIDTH)).tolist():
                task = asyncio.create_task(self._ask(way, model, x))
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)
        while self._asking:
            await asyncio.wait(set(self._asking))
        for way in self._ways:
            await way.close()

    async def _ask(self, way: Way, model: Model, x: list[int]) -> None:
        asked = time.time()
        self.ledger.note(way.name, model.name, asked, await way.ask(model, x))


def _normed(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]
