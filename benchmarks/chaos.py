"""Faults done to a running stack, drawn from a seed, and undone again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import quote

import msgspec
import numpy as np
import psutil

from benchmarks.faultstack import FaultStack
from roost.local.process import ServiceFailed

_PAUSE_S: Final = (0.3, 8.0)
"""How long a process is suspended, or an alarm lasts: shorter and longer than the leases and
reports of the parts live (2 to 3 s)."""


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
        self, stack: FaultStack, rng: np.random.Generator, *, every_s: float, only: str = ""
    ) -> None:
        """`every_s`: from one fault's beginning to the next one's, on average. `only`: faults
        whose name begins so."""
        self.done: list[Done] = []
        self._stack = stack
        self._rng = rng
        self._every_s = every_s
        self._busy: set[str] = set()
        """What a fault is being done to."""
        self._lasting: set[asyncio.Task[None]] = set()
        kinds: dict[str, tuple[float, Callable[[], list[str]], Callable[[str], Awaitable[None]]]]
        kinds = {
            "kill": (6, self._services, self._kill),
            "kill engine": (3, stack.workers, self._kill_engine),
            "suspend": (4, self._services, self._suspend),
            "suspend engine": (2, stack.workers, self._suspend_engine),
            "restart": (3, self._services, stack.restart),
            "broker: kill": (1, _broker, self._kill_broker),
            "broker: restart": (1, _broker, self._restart_broker),
            "broker: suspend": (1, _broker, self._suspend_broker),
            "broker: alarm": (1, _broker, self._alarm),
            "broker: cut connections": (3, _broker, self._cut),
            "store: kill": (1, _store, self._kill_store),
            "store: suspend": (1, _store, self._suspend_store),
            "store: flush": (2, _store, self._flush_store),
        }
        self._kinds = {name: kind for name, kind in kinds.items() if name.startswith(only)}

    async def run(self, stop: asyncio.Event, faults: int | None = None) -> None:
        """Until `stop`, or so many faults, and until all of them are undone."""
        while not stop.is_set() and (faults is None or len(self.done) < faults):
            pause = float(self._rng.exponential(self._every_s))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await stop.wait()
                break
            self._begin()
        while self._lasting:
            await asyncio.wait(set(self._lasting))

    def _begin(self) -> None:
        names = list(self._kinds)
        weights = np.array([self._kinds[name][0] for name in names], float)
        name = names[int(self._rng.choice(len(names), p=weights / weights.sum()))]
        _, targets, do = self._kinds[name]
        free = [target for target in targets() if target not in self._busy]
        if not free:
            return
        target = free[int(self._rng.integers(len(free)))]
        task = asyncio.create_task(self._do(name, target, do), name=f"{name} {target}")
        self._lasting.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._lasting.discard(task)
        task.result()  # a fault that could not be done is a fault of ours

    async def _do(self, name: str, target: str, do: Callable[[str], Awaitable[None]]) -> None:
        self._busy.add(target)
        at = time.time()
        try:
            await do(target)
        finally:
            self._busy.discard(target)
        self.done.append(Done(at, time.time() - at, name, target))

    def _pause_s(self) -> float:
        return float(self._rng.uniform(*_PAUSE_S))

    # --- services -----------------------------------------------------------------------------

    def _services(self) -> list[str]:
        return list(self._stack.pids())

    async def _kill(self, name: str) -> None:
        self._stack.signal(name, signal.SIGKILL)
        await self._stack.revived(name)

    async def _suspend(self, name: str) -> None:
        self._stack.signal(name, signal.SIGSTOP)
        await asyncio.sleep(self._pause_s())
        self._stack.signal(name, signal.SIGCONT)

    async def _kill_engine(self, worker: str) -> None:
        for pid in self._engines(worker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def _suspend_engine(self, worker: str) -> None:
        pids = self._engines(worker)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(self._pause_s())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _engines(self, worker: str) -> list[int]:
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):
            return [each.pid for each in psutil.Process(self._stack.pids()[worker]).children()]
        return []

    # --- broker and store ---------------------------------------------------------------------

    async def _kill_broker(self, _: str) -> None:
        await asyncio.to_thread(self._stack.rabbit.kill)
        await asyncio.to_thread(self._stack.rabbit.start)

    async def _restart_broker(self, _: str) -> None:
        await asyncio.to_thread(self._stack.rabbit.stop)
        await asyncio.to_thread(self._stack.rabbit.start)

    async def _suspend_broker(self, _: str) -> None:
        self._stack.rabbit.pause()
        await asyncio.sleep(self._pause_s())
        self._stack.rabbit.resume()

    async def _alarm(self, _: str) -> None:
        """RabbitMQ thinks that it has no memory left, and blocks whoever publishes."""
        rabbit = self._stack.rabbit
        await asyncio.to_thread(rabbit.ctl, "set_vm_memory_high_watermark", "0.00001")
        await asyncio.sleep(self._pause_s())
        await asyncio.to_thread(rabbit.ctl, "set_vm_memory_high_watermark", "0.4")

    async def _cut(self, _: str) -> None:
        """Some of the connections to the broker are closed by force."""
        rabbit = self._stack.rabbit
        names = [
            each["name"]
            for each in json.loads(await asyncio.to_thread(rabbit.api, "GET", "/api/connections"))
        ]
        for name in names:
            if self._rng.random() < 0.5:
                with contextlib.suppress(ServiceFailed):  # it has gone by itself
                    path = f"/api/connections/{quote(name, safe='')}"
                    await asyncio.to_thread(rabbit.api, "DELETE", path)

    async def _kill_store(self, _: str) -> None:
        await asyncio.to_thread(self._stack.redis.kill)
        await asyncio.sleep(float(self._rng.uniform(0, 3)))
        await asyncio.to_thread(self._stack.redis.start)

    async def _suspend_store(self, _: str) -> None:
        self._stack.redis.pause()
        await asyncio.sleep(self._pause_s())
        self._stack.redis.resume()

    async def _flush_store(self, _: str) -> None:
        await asyncio.to_thread(self._stack.redis.flush)


def _broker() -> list[str]:
    return ["rabbitmq"]


def _store() -> list[str]:
    return ["redis"]
