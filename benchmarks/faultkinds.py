"""The kinds of faults: to what each can be done, how it is done, and undone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec
import numpy as np
import psutil

from benchmarks.faultstack import PLACERS, FaultStack
from benchmarks.proxy import Proxy
from roost.local.process import ServiceFailed

SHORTEST_S: Final = 0.3
LONGEST_S: Final = 8.0
"""How long a process is suspended, or an alarm lasts: shorter and longer than the leases and
reports of the parts live (2 to 3 s)."""
_LATENCY_S: Final = (0.005, 0.2)
_LOSS: Final = (0.01, 0.2)
_CLOCK_S: Final = 10.0
"""Either way; less than a request of the load has until its deadline: one whose worker's clock is
ahead by more is expired, and says so."""
_LEAD_S: Final = 20.0
"""Within which another placer leads, or just one again."""
_FILLER: Final = "filler"
_PIECE: Final = bytes(1 << 20)


class Kind(msgspec.Struct, frozen=True):
    weight: float
    """How often it is drawn, against the others."""
    targets: Callable[[], list[str]]
    do: Callable[[str], Awaitable[None]]
    """Returns once it is undone."""


def kinds_of(
    stack: FaultStack, rng: np.random.Generator, longest_s: float = LONGEST_S
) -> tuple[dict[str, Kind], dict[str, str]]:
    """By name; and those that cannot be done here, with the reason. `longest_s`: of what lasts."""
    given = stack, rng, longest_s
    parts, broker, store = _Parts(*given), _Broker(*given), _Store(*given)
    links, host = _Links(*given), _Host(*given)
    every, workers = parts.services, stack.workers
    kinds = {
        "kill": Kind(6, every, parts.kill),
        "kill engine": Kind(3, workers, parts.kill_engine),
        "suspend": Kind(4, every, parts.suspend),
        "suspend engine": Kind(2, workers, parts.suspend_engine),
        "restart": Kind(3, every, stack.restart),
        "two leaders": Kind(1.5, lambda: ["placers"], parts.two_leaders),
        "broker: kill": Kind(1, _broker, broker.kill),
        "broker: restart": Kind(1, _broker, broker.restart),
        "broker: suspend": Kind(1, _broker, broker.suspend),
        "broker: memory alarm": Kind(1, _broker, broker.memory_alarm),
        "broker: disk alarm": Kind(1, _broker, broker.disk_alarm),
        "broker: cut connections": Kind(3, _broker, broker.cut),
        "store: kill": Kind(1, _store, store.kill),
        "store: suspend": Kind(1, _store, store.suspend),
        "store: flush": Kind(2, _store, store.flush),
        "link: latency and loss": Kind(2, lambda: list(stack.links), links.slow),
        "link: stopped": Kind(2, lambda: list(stack.links), links.stop),
        "link: half-open": Kind(2, lambda: list(stack.links), links.forget),
        "link: cut": Kind(2, lambda: list(stack.links), links.cut),
        "clock step": Kind(2, every, host.step_clock),
        "disk full": Kind(1.5, lambda: ["repository"], host.fill_disk),
    }
    missing = {}
    if stack.clocks.missing:
        missing["clock step"] = stack.clocks.missing
    if not os.path.ismount(stack.repository_folder):
        missing["disk full"] = "the repository has no small disk of its own: mounting needs root"
    return {name: kind for name, kind in kinds.items() if name not in missing}, missing


def _broker() -> list[str]:
    return ["rabbitmq"]


def _store() -> list[str]:
    return ["redis"]


class _Doer:
    def __init__(self, stack: FaultStack, rng: np.random.Generator, longest_s: float) -> None:
        self._stack = stack
        self._rng = rng
        self._longest_s = longest_s

    async def _pause(self) -> None:
        await asyncio.sleep(float(self._rng.uniform(SHORTEST_S, self._longest_s)))


class _Parts(_Doer):
    """Services and their engines."""

    def services(self) -> list[str]:
        return list(self._stack.pids())

    async def kill(self, name: str) -> None:
        self._stack.signal(name, signal.SIGKILL)
        await self._stack.revived(name)

    async def suspend(self, name: str) -> None:
        self._stack.signal(name, signal.SIGSTOP)
        await self._pause()
        self._stack.signal(name, signal.SIGCONT)

    async def kill_engine(self, worker: str) -> None:
        for pid in self._engines(worker):
            _signal(pid, signal.SIGKILL)

    async def suspend_engine(self, worker: str) -> None:
        pids = self._engines(worker)
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        await self._pause()
        for pid in pids:
            _signal(pid, signal.SIGCONT)

    def _engines(self, worker: str) -> list[int]:
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):
            return [each.pid for each in psutil.Process(self._stack.pids()[worker]).children()]
        return []

    async def two_leaders(self, _: str) -> None:
        """The placer that leads sleeps until the other leads, and awakes in the belief that it
        still does. Raises `TimeoutError` unless there is one leader again."""
        leaders = await self._stack.leaders()
        if not leaders:
            return  # another fault is at it
        old = leaders[0]
        (other,) = set(PLACERS) - {old}
        try:
            self._stack.signal(old, signal.SIGSTOP)
            with contextlib.suppress(TimeoutError):  # the other may be under another fault
                async with asyncio.timeout(_LEAD_S):
                    await self._stack.led(lambda leaders: other in leaders)
        finally:
            self._stack.signal(old, signal.SIGCONT)
        async with asyncio.timeout(_LEAD_S):
            await self._stack.led(lambda leaders: len(leaders) <= 1)


class _Broker(_Doer):
    async def kill(self, _: str) -> None:
        await asyncio.to_thread(self._stack.rabbit.kill)
        await asyncio.to_thread(self._stack.rabbit.start)

    async def restart(self, _: str) -> None:
        await asyncio.to_thread(self._stack.rabbit.stop)
        await asyncio.to_thread(self._stack.rabbit.start)

    async def suspend(self, _: str) -> None:
        self._stack.rabbit.pause()
        await self._pause()
        self._stack.rabbit.resume()

    async def memory_alarm(self, _: str) -> None:
        """RabbitMQ thinks that it has no memory left, and blocks whoever publishes."""
        await self._alarm(("set_vm_memory_high_watermark", "0.00001"),
                          ("set_vm_memory_high_watermark", "0.4"))  # fmt: skip

    async def disk_alarm(self, _: str) -> None:
        """And that it has no disk left."""
        await self._alarm(("set_disk_free_limit", "1000000GB"), ("set_disk_free_limit", "50MB"))

    async def _alarm(self, begin: tuple[str, str], end: tuple[str, str]) -> None:
        await asyncio.to_thread(self._stack.rabbit.ctl, *begin)
        await self._pause()
        await asyncio.to_thread(self._stack.rabbit.ctl, *end)

    async def cut(self, _: str) -> None:
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


class _Store(_Doer):
    async def kill(self, _: str) -> None:
        await asyncio.to_thread(self._stack.redis.kill)
        await asyncio.sleep(float(self._rng.uniform(0, 3)))
        await asyncio.to_thread(self._stack.redis.start)

    async def suspend(self, _: str) -> None:
        self._stack.redis.pause()
        await self._pause()
        self._stack.redis.resume()

    async def flush(self, _: str) -> None:
        await asyncio.to_thread(self._stack.redis.flush)


class _Links(_Doer):
    """Between a service and the broker or the store."""

    async def slow(self, name: str) -> None:
        proxy = self._proxy(name)
        proxy.latency_s = float(self._rng.uniform(*_LATENCY_S))
        proxy.loss = float(self._rng.uniform(*_LOSS))
        await self._pause()
        proxy.latency_s = proxy.loss = 0.0

    async def stop(self, name: str) -> None:
        self._proxy(name).stop()
        await self._pause()
        self._proxy(name).go_on()

    async def forget(self, name: str) -> None:
        self._proxy(name).forget()

    async def cut(self, name: str) -> None:
        self._proxy(name).cut()

    def _proxy(self, name: str) -> Proxy:
        return self._stack.links[name]


class _Host(_Doer):
    """What the machine itself may do to its processes."""

    async def step_clock(self, name: str) -> None:
        """One service's wall clock steps, and after a while back."""
        self._stack.clocks.set_off(name, float(self._rng.uniform(-_CLOCK_S, _CLOCK_S)))
        await self._pause()
        self._stack.clocks.set_off(name, 0.0)

    async def fill_disk(self, _: str) -> None:
        filler = self._stack.repository_folder / _FILLER
        try:
            await asyncio.to_thread(_fill, filler)
            await self._pause()
        finally:
            await asyncio.to_thread(filler.unlink)


def _fill(file: Path) -> None:
    """Writes until there is no room for one byte more."""
    with file.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(_PIECE)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
