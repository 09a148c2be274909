"""What keep-alive connections cost one gateway: many clients that are there and ask now and then.

A real stack; the clients are this process. The executor takes its times from a table: the device
is not what is measured.
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections import Counter
from typing import Final
from urllib.parse import urlsplit

import numpy as np
import psutil

from benchmarks import baseline
from benchmarks.keepalive import Connection, connect, head
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.stack import BenchStack, running
from benchmarks.statistics import quantile
from benchmarks.table import WIDTH, Table, register

_MODEL: Final = "model"
_AT_ONCE: Final = 64
"""Requests under way while connections are opened."""
_PROBES: Final = 1000
_TABLE: Final = Table(cases=((1, 0.002), (32, 0.008)), load_seconds=0.05)


async def run(device: str, *, connections: int = 10_000, seed: int = 0) -> Outcome:
    """Raises `OSError` where the system allows this process fewer sockets."""
    began = time.monotonic()
    figures = await measure(connections, seed)
    return Outcome(
        "connections",
        f"{connections:,} keep-alive connections to one gateway, each of which has asked once",
        machine(*baseline.described(device)),
        tuple(figures),
        time.monotonic() - began,
        now(),
    )


async def measure(connections: int, seed: int) -> list[Figure]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rng = np.random.default_rng(seed)
    async with running("connections", workers=1, budget_bytes=64 << 20, table=True) as stack:
        register(stack.repository, _MODEL, _TABLE, target_ms=100.0)
        gateway, request = psutil.Process(stack.pids()["gateway"]), _request()
        few = await _open(stack, _AT_ONCE, request)
        await _probe(few, request, rng)  # what is made once is made now
        quick = await _probe(few, request, rng)
        before = gateway.memory_info().rss
        many = few + await _open(stack, connections - len(few), request)
        held = gateway.memory_info().rss
        beside = await _probe(many, request, rng)
        still = sum(not each.lost for each in many)
        answers = await asyncio.gather(*(each.ask(request) for each in many))
        burst = Counter(answer.status for answer in answers)
        after = gateway.memory_info().rss
        kept = sum(not each.lost for each in many)
        for each in many:
            if each.transport is not None:
                each.transport.close()
    told = {200: "answered", 429: "told to come later (429)", 503: "told to come later (503)"}
    return [
        Figure("resident memory of the gateway that holds them", held / 2**20, "MiB", 1024),
        Figure("connections held", still, "", connections, "at least"),
        Figure("memory of each", (held - before) / (connections - len(few)), "B"),
        Figure("p50 of a request through any of them", quantile(beside, 0.5) * 1e3, "ms"),
        Figure(f"… with {_AT_ONCE} connections", quantile(quick, 0.5) * 1e3, "ms"),
        Figure("p99 of a request through any of them", quantile(beside, 0.99) * 1e3, "ms"),
        Figure(f"… with {_AT_ONCE} connections", quantile(quick, 0.99) * 1e3, "ms"),
        *(Figure(f"all ask at once: {what}", burst[code], "requests")
          for code, what in told.items()),
        Figure("all ask at once: no answer", connections - sum(burst[code] for code in told),
               "requests", 0),
        Figure("connections held afterwards", kept, "", connections, "at least"),
        Figure("resident memory afterwards", after / 2**20, "MiB", 1024),
    ]  # fmt: skip


async def _open(stack: BenchStack, count: int, request: bytes) -> list[Connection]:
    """Each asks once, so that all of a connection's parts are there."""
    url = urlsplit(stack.gateway_url)
    host, port = url.hostname or "", url.port or 0
    room = asyncio.Semaphore(_AT_ONCE)

    async def one() -> Connection:
        async with room:
            connection = await connect(host, port)
            answer = await connection.ask(request)
            if answer.status != 200:
                raise RuntimeError(f"a first request was answered with {answer.status}")
            return connection

    return list(await asyncio.gather(*(one() for _ in range(count))))


async def _probe(
    connections: list[Connection], request: bytes, rng: np.random.Generator
) -> list[float]:
    """Seconds of requests one after the other, each through any connection."""
    seconds = []
    for number in rng.integers(len(connections), size=_PROBES):
        began = time.perf_counter()
        await connections[int(number)].ask(request)
        seconds.append(time.perf_counter() - began)
    return seconds


def _request() -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": [1.0] * WIDTH}
    body = json.dumps({"inputs": [tensor]}).encode()
    return head(_MODEL, len(body)) + body
