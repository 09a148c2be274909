"""N7: what 9,900 models cost that are registered and that nobody asks for.

Two real stacks side by side, one with 100 models registered, one with 10,000; in both the same
few are asked. They take turns, a few seconds each, so that a noisy machine is noisy for both.
Executors take their times from a table: the device is not what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import httpx
import numpy as np

from benchmarks import baseline
from benchmarks.asking import Ask, Client
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.stack import BenchStack, running
from benchmarks.statistics import median, quantile
from benchmarks.table import Table, put_file, register, request, spec_of
from shared.repository import Repository

_ACTIVE: Final = 8
_RATE: Final = 60.0
"""Requests per second while latency is measured: every second one over HTTP."""
_LATENCY_S: Final = 5.0
_CLIENTS: Final = 16
_THROUGHPUT_S: Final = 2.5
_DEADLINE_S: Final = 10.0
_SETTLE_S: Final = 7.0
"""The placer looks for registrations every five seconds."""
_TABLE: Final = Table(cases=((1, 0.002), (16, 0.006)), load_seconds=0.05)


@dataclass
class _Side:
    """One of the two stacks, and what was measured on it."""

    stack: BenchStack
    client: Client
    latencies: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    """One of each turn."""
    throughput: list[float] = field(default_factory=list)
    ticks: float = 0.0
    tick_seconds: float = 0.0
    failed: int = 0

    async def turn(self, rng: np.random.Generator) -> None:
        """Latency at a moderate rate, then the most that some clients get."""
        before = await self._tick()
        models = rng.integers(_ACTIVE, size=int(_RATE * _LATENCY_S))
        asks = [
            Ask(number / _RATE, _name(int(model)), http=number % 2 == 0)
            for number, model in enumerate(models)
        ]
        answers = await self.client.play(asks)
        self.failed += sum(not answer.ok for answer in answers)
        self.latencies += [answer.seconds for answer in answers]
        self.p99.append(quantile([answer.seconds for answer in answers], 0.99))
        after = await self._tick()
        self.ticks += after[0] - before[0]
        self.tick_seconds += after[1] - before[1]
        self.throughput.append(await self._most())

    async def _most(self) -> float:
        """Requests per second of clients that ask again at once, over HTTP."""
        until = time.perf_counter() + _THROUGHPUT_S

        async def ask(number: int) -> int:
            done = 0
            while time.perf_counter() < until:
                answer = await self.client.ask(_name(number % _ACTIVE), http=True)
                self.failed += not answer.ok
                done += 1
            return done

        began = time.perf_counter()
        done = await asyncio.gather(*(ask(number) for number in range(_CLIENTS)))
        return sum(done) / (time.perf_counter() - began)

    async def _tick(self) -> tuple[float, float]:
        """How many, and their seconds."""
        name = "roost_placer_tick_seconds"
        return await self.stack.metric(f"{name}_count"), await self.stack.metric(f"{name}_sum")


async def run(
    device: str, *, few: int = 100, many: int = 10_000, rounds: int = 6, seed: int = 0
) -> Outcome:
    began = time.monotonic()
    figures = await measure(few=few, many=many, rounds=rounds, seed=seed)
    what = (
        f"{many:,} registered models against {few}, of which {_ACTIVE} are asked; two stacks in "
        f"turns, {rounds} turns of {_LATENCY_S + _THROUGHPUT_S:g} s"
    )
    ran_on = machine(*baseline.described(device))
    return Outcome("idle", what, ran_on, tuple(figures), time.monotonic() - began, now())


async def measure(*, few: int, many: int, rounds: int, seed: int) -> list[Figure]:
    rng = np.random.default_rng(seed)
    async with contextlib.AsyncExitStack() as ends:
        small, large = [await _side(ends, few) for _ in range(2)]
        for side in (small, large, small, large):  # allocators and caches settle
            await side.turn(rng)
        before = [await _memory(side.stack) for side in (small, large)]
        began = time.perf_counter()
        await asyncio.to_thread(_register, large.stack.repository, few, many)
        took = time.perf_counter() - began
        await asyncio.sleep(_SETTLE_S)
        for side in (small, large):
            side.latencies.clear()
            side.p99.clear()
            side.throughput.clear()
            side.ticks = side.tick_seconds = 0.0
        for _ in range(rounds):
            for side in (small, large):
                await side.turn(rng)
        after = [await _memory(side.stack) for side in (small, large)]
        grown = _grown(before, after, many - few)
        keys = [await side.stack.redis_keys() for side in (small, large)]
        queues = [await side.stack.queues() for side in (small, large)]
        # Somebody lists them all, as a person does.
        for side in (small, large):
            await _list_all(side.stack)
        listed = _grown(before, [await _memory(side.stack) for side in (small, large)], many - few)
    ticks = [side.tick_seconds / max(side.ticks, 1) * 1e3 for side in (small, large)]
    return [
        Figure("p99 of active models over p99 with few registered, median of the turns",
               median(_ratios(large.p99, small.p99)), "x", 1.1),
        Figure("… of all turns together",
               quantile(large.latencies, 0.99) / quantile(small.latencies, 0.99), "x"),
        Figure("p99 with few registered", quantile(small.latencies, 0.99) * 1e3, "ms"),
        Figure("p99 with many", quantile(large.latencies, 0.99) * 1e3, "ms"),
        Figure("throughput over that with few", median(_ratios(large.throughput, small.throughput)),
               "x"),
        Figure("… with few", median(small.throughput), "requests/s"),
        Figure("the placer's cycle, mean, with few", ticks[0], "ms"),
        Figure("the placer's cycle, mean, with many", ticks[1], "ms", 100),
        Figure("memory of all processes per idle model", sum(grown.values()), "B", 2000),
        *(Figure(f"… of {name}", value, "B") for name, value in grown.items()),
        Figure("memory per idle model once somebody has listed all", sum(listed.values()), "B"),
        Figure("more keys in Redis", keys[1] - keys[0], "", 0),
        Figure("more queues in RabbitMQ", queues[1] - queues[0], "", 0),
        Figure("requests that failed", small.failed + large.failed, "", 0),
        Figure("registering one", took / (many - few) * 1e3, "ms"),
    ]  # fmt: skip


async def _side(ends: contextlib.AsyncExitStack, few: int) -> _Side:
    stack = await ends.enter_async_context(
        running("idle", workers=1, budget_bytes=64 << 20, table=True)
    )
    await asyncio.to_thread(_register, stack.repository, 0, few)
    client = Client(await stack.producer(), stack.gateway_url, request(), deadline_s=_DEADLINE_S)
    ends.push_async_callback(client.close)
    await client.start()
    for number in range(_ACTIVE):
        await client.ask(_name(number))
    return _Side(stack, client)


def _register(repository: Repository, start: int, stop: int) -> None:
    """The first few as table executors need them; all share one file."""
    digest, spec = put_file(repository), spec_of(_TABLE, 100.0)
    for number in range(start, stop):
        if number < _ACTIVE:
            register(repository, _name(number), _TABLE, target_ms=100.0)
        else:
            repository.register(_name(number), 1, spec, digest)


def _name(number: int) -> str:
    return f"model-{number:05d}"


async def _memory(stack: BenchStack) -> dict[str, int]:
    """Bytes that each process has to itself."""
    return {**stack.memory(), "redis (data)": await stack.redis_bytes()}


def _grown(
    before: Sequence[dict[str, int]], after: Sequence[dict[str, int]], models: int
) -> dict[str, float]:
    """Bytes per model by which each process of the large stack grew more than the small one's:
    what time alone does is in both."""
    (small_before, large_before), (small_after, large_after) = before, after
    return {
        name: (large_after[name] - large_before[name] - small_after[name] + small_before[name])
        / models
        for name in large_after
    }


async def _list_all(stack: BenchStack) -> None:
    async with httpx.AsyncClient(timeout=120.0, trust_env=False) as client:
        answer = await client.post(f"{stack.gateway_url}/v2/repository/index")
        answer.raise_for_status()


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]
