"""Faults done to a running stack, drawn from a seed, and undone again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping

import msgspec
import numpy as np

from benchmarks.faultkinds import Kind


class Done(msgspec.Struct, frozen=True):
    """One fault."""

    at: float
    """Unix time."""
    seconds: float
    what: str
    target: str


class Chaos:
    """Does one fault after the other, some of them while another lasts."""

    def __init__(
        self,
        kinds: Mapping[str, Kind],
        rng: np.random.Generator,
        *,
        every_s: float,
        only: str = "",
    ) -> None:
        """`every_s`: from one fault's beginning to the next one's, on average. `only`: faults
        whose name begins so."""
        self.done: list[Done] = []
        self.failed: list[str] = []
        """Faults that could not be done, or were not borne as they must be, and why."""
        self._rng = rng
        self._every_s = every_s
        self._busy: set[str] = set()
        """What a fault is being done to."""
        self._lasting: set[asyncio.Task[None]] = set()
        self._kinds = {name: kind for name, kind in kinds.items() if name.startswith(only)}

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, and until all faults are undone."""
        while not stop.is_set():
            pause = float(self._rng.exponential(self._every_s))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await stop.wait()
                break
            self._begin()
        while self._lasting:
            await asyncio.wait(set(self._lasting))

    async def each(self, pause_s: float) -> None:
        """Every kind once, in order, each undone before the next begins."""
        for name in self._kinds:
            await asyncio.sleep(pause_s)
            self._begin(name)
            while self._lasting:
                await asyncio.wait(set(self._lasting))

    def _begin(self, name: str = "") -> None:
        names = list(self._kinds)
        weights = np.array([self._kinds[each].weight for each in names], float)
        name = name or names[int(self._rng.choice(len(names), p=weights / weights.sum()))]
        kind = self._kinds[name]
        free = [target for target in kind.targets() if target not in self._busy]
        if not free:
            return
        target = free[int(self._rng.integers(len(free)))]
        task = asyncio.create_task(self._do(name, target, kind), name=f"{name} {target}")
        self._lasting.add(task)
        task.add_done_callback(self._lasting.discard)

    async def _do(self, name: str, target: str, kind: Kind) -> None:
        self._busy.add(target)
        at = time.time()
        try:
            await kind.do(target)
        except Exception as error:  # noqa: BLE001  (the run goes on, and ends as failed)
            self.failed.append(f"{name} of {target}: {error!r}")
        finally:
            self._busy.discard(target)
        self.done.append(Done(at, time.time() - at, name, target))
