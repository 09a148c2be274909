"""What it costs to know how many messages wait: `python -m benchmarks.depths`.

A private RabbitMQ with 10 to 5,000 durable queues; the ways in which a placer could read depths,
each by its time, the CPU time of this process, its bytes, and how old the answer is. ADR 0012
decides by these figures.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

import httpx

from roost.local.rabbit import RabbitNode
from shared.broker.amqp import AmqpBroker
from shared.broker.port import Message

COUNTS: Final = (10, 100, 1_000, 5_000)
ASKED: Final = (1, 16, 64, 256)
"""Queues asked by passive declares in one go."""
_CONCURRENCY: Final = 16
_ROUNDS: Final = 15
_FRESHNESS_ROUNDS: Final = 3
_LOOKS: Final = 600
_COARSE: Final = "/metrics/detailed?family=queue_coarse_metrics"


async def main() -> None:
    """Prints one line per way and number of queues."""
    with tempfile.TemporaryDirectory(prefix="roost-depths-") as folder:
        node = RabbitNode(Path(folder) / "rabbit")
        await asyncio.to_thread(node.start)
        try:
            print(f"RabbitMQ {_version(node)}, {_ROUNDS} rounds, medians; CPU is this process's")
            await _measure(node)
        finally:
            await asyncio.to_thread(node.kill)


async def _measure(node: RabbitNode) -> None:
    broker = AmqpBroker(node.amqp_url, "depths")
    await broker.start()
    made = 0
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        for count in COUNTS:
            began = time.perf_counter()
            for index in range(made, count):
                await broker.declare_queue(_name(index))
            made = count
            print(f"\n{count} queues (declared in {time.perf_counter() - began:.1f} s)")
            for asked in (n for n in ASKED if n <= count):
                await _passive(broker, count, asked)
            for what, url in (
                ("prometheus, coarse metrics", node.prometheus_url + _COARSE),
                ("management, two columns", _management(node)),
            ):
                size = 0

                async def fetch(url: str = url) -> None:
                    nonlocal size
                    size = len((await client.get(url)).raise_for_status().content)

                await _time(what, fetch, rounds=5 if count >= 1000 else _ROUNDS)
                print(f"    {size:,} bytes", flush=True)
                await _age(what, client, url, broker)
    await broker.close()


async def _passive(broker: AmqpBroker, count: int, asked: int) -> None:
    names = [_name(index * count // asked) for index in range(asked)]
    room = asyncio.Semaphore(_CONCURRENCY)

    async def one(name: str) -> None:
        async with room:
            assert await broker.depth(name) is not None

    async def ask() -> None:
        await asyncio.gather(*map(one, names))

    await _time(f"passive declares of {asked}, {_CONCURRENCY} at once", ask, each=asked)


async def _time(
    what: str, act: Callable[[], Awaitable[None]], *, each: int = 1, rounds: int = _ROUNDS
) -> None:
    await act()
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        await act()
        walls.append((time.perf_counter() - wall) * 1000)
        cpus.append((time.process_time() - cpu) * 1000)
    wall, cpu = statistics.median(walls), statistics.median(cpus)
    print(
        f"  {what}: {wall:.2f} ms (worst {max(walls):.1f}), CPU {cpu:.2f} ms"
        + (f"; each {wall / each:.2f} ms, CPU {cpu / each:.2f} ms" if each > 1 else ""),
        flush=True,
    )


async def _age(what: str, client: httpx.AsyncClient, url: str, broker: AmqpBroker) -> None:
    """How long after a confirmed publish the answer shows it."""
    ages = []
    queue = _name(0)
    for _ in range(_FRESHNESS_ROUNDS):
        before = await _shown(client, url, queue)
        await broker.publish("", queue, Message(body=b"x"))
        began = time.perf_counter()
        for _ in range(_LOOKS):
            if await _shown(client, url, queue) != before:
                break
            await asyncio.sleep(0.05)
        else:
            raise RuntimeError(f"{what} never showed the message")
        ages.append(time.perf_counter() - began)
    print(f"    {what} shows a message after {min(ages):.2f} to {max(ages):.2f} s", flush=True)


async def _shown(client: httpx.AsyncClient, url: str, queue: str) -> str:
    """The part of the answer that tells of this queue's ready messages."""
    answer = await client.get(url)
    if "prometheus" in answer.headers.get("content-type", "") or url.endswith(_COARSE):
        for line in answer.text.splitlines():
            if line.startswith("rabbitmq_detailed_queue_messages_ready{") and queue in line:
                return line.rsplit(" ", 1)[1]
        return ""
    return next((str(q.get("messages_ready")) for q in answer.json() if q["name"] == queue), "")


def _management(node: RabbitNode) -> str:
    vhost = quote("/", safe="")
    return f"{node.management_url}/api/queues/{vhost}?columns=name,messages_ready"


def _version(node: RabbitNode) -> str:
    return node.ctl("version").strip()


def _name(index: int) -> str:
    return f"roost.model.m{index:05}.1"


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
