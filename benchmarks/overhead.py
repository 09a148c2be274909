"""N4: what reaches the client of what the device could do, through HTTP, gRPC and AMQP.

On the real stack: clients, gateway, broker, worker, engine. Against it, in turns, a bare loop in
this process that runs the same model on batches of the sizes that the worker formed. The device is
the same core in both. Everything else has the other cores: on a machine with two, the clients,
the broker and the services share one, so the CPU that each of them takes is told as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
import grpc.aio
import numpy as np
import torch

from benchmarks import baseline
from benchmarks.asking import Client
from benchmarks.density import NAMES
from benchmarks.driver import request
from benchmarks.keepalive import Connection, connect, head
from benchmarks.models import FAMILIES, Factory, Family, Registered, family, register
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.stack import BenchStack, running
from benchmarks.statistics import median
from services.gateway.grpc import inference_pb2 as pb
from shared.v2 import encode_request

_CLIENTS: Final = 64
_TURN_S: Final = 4.0
_WARM_S: Final = 2.0
_CALLS: Final = 60
"""Of one client that waits for each answer, in a turn."""
_REACH: Final = "minilm"
"""The model that N4's reach at saturation is of."""
_DEADLINE_S: Final = 30.0

Ask = Callable[[], Awaitable[bool]]
"""One request by one client; whether it was answered well."""


@dataclass
class _Way:
    """One way in, and what was measured on it."""

    name: str
    clients: list[Ask]
    rates: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    """Seconds of requests of one client."""
    answered: int = 0
    failed: int = 0
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of each process while its clients asked."""


class _Sizes(Counter[int]):
    """Requests by the rows of their batch, while all clients ask: one alone has batches of one."""

    counting = False

    def note(self, rows: int) -> None:
        if self.counting:
            self[rows] += 1


@dataclass
class _Bare:
    rates: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    rows: int = 0
    cpu_s: float = 0.0


async def run(
    device: str,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    rounds: int = 3,
    turn_s: float = _TURN_S,
    seed: int = 0,
) -> Outcome:
    """Each family of benchmarks/models.py in a stack of its own: about a minute each."""
    began = time.monotonic()
    figures: list[Figure] = []
    for name in families:
        chosen = family(name, device)
        figures += await measure(device, chosen, rounds=rounds, turn_s=turn_s, seed=seed)
    figures.sort(key=lambda figure: figure.reach is None)
    return Outcome(
        "overhead",
        f"{_CLIENTS} clients that ask again at once, and one alone, against a bare loop of the "
        f"same batches; {rounds} turns of {turn_s:g} s each",
        machine(*baseline.described(device)),
        tuple(figures),
        time.monotonic() - began,
        now(),
    )


async def measure(
    device: str, chosen: Family, *, rounds: int, turn_s: float, seed: int
) -> list[Figure]:
    async with running(
        "overhead", workers=1, budget_bytes=4 << 30, table=False, device=device
    ) as stack:
        made = (await asyncio.to_thread(register, stack.data, Factory(chosen), 1))[0]
        ways, sizes = [], _Sizes()
        async with contextlib.AsyncExitStack() as ends:
            for way in await _ways(ends, stack, made, chosen, sizes):
                ways.append(way)
                await _saturate(stack, way, sizes, _WARM_S)
                way.answered = 0
                way.cpu.clear()
            sizes.clear()
            bare = _BareLoop(made, chosen, device, seed)
            for way in ways:
                way.rates.clear()
            measured = _Bare()
            for _ in range(rounds):
                for way in ways:
                    await _saturate(stack, way, sizes, turn_s)
                    await _alone(way)
                await asyncio.to_thread(bare.saturate, measured, sizes, turn_s)
                await asyncio.to_thread(bare.alone, measured)
    return _figures(chosen.name, ways, measured, sizes)


# --- ways in ---------------------------------------------------------------------------------


async def _ways(
    ends: contextlib.AsyncExitStack,
    stack: BenchStack,
    made: Registered,
    chosen: Family,
    sizes: _Sizes,
) -> list[_Way]:
    body = encode_request(request(chosen.inputs(1), NAMES))
    name = made.manifest.name
    first = await _http(stack.gateway_url, name, body, sizes, _CLIENTS)
    url = await stack.add_gateway()
    second = await _http(url, name, body, sizes, _CLIENTS // 2)
    amqp = await ends.enter_async_context(_amqp(stack, name, body))
    by_grpc = await ends.enter_async_context(_grpc(stack, name, chosen))
    return [
        _Way("HTTP", first),
        _Way("HTTP, two gateways", first[: _CLIENTS // 2] + second),
        _Way("gRPC", by_grpc),
        _Way("AMQP", amqp),
    ]


async def _http(
    url: str, model: str, body: tuple[bytes, int | None], sizes: _Sizes, count: int
) -> list[Ask]:
    parts = urlsplit(url)
    data = head(model, len(body[0]), body[1]) + body[0]

    def asking(connection: Connection) -> Ask:
        async def ask() -> bool:
            answer = await connection.ask(data)
            sizes.note(answer.batch_rows)
            return answer.status == 200

        return ask

    host, port = parts.hostname or "", parts.port or 0
    return [asking(await connect(host, port)) for _ in range(count)]


@contextlib.asynccontextmanager
async def _amqp(
    stack: BenchStack, model: str, body: tuple[bytes, int | None]
) -> AsyncIterator[list[Ask]]:
    client = Client(await stack.producer(), stack.gateway_url, body, deadline_s=_DEADLINE_S)

    async def ask() -> bool:
        return (await client.ask(model)).ok

    try:
        await client.start()
        yield [ask] * _CLIENTS
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def _grpc(stack: BenchStack, model: str, chosen: Family) -> AsyncIterator[list[Ask]]:
    """One channel for each client, as separate ones have it. Bytes as they travel: what a client
    makes of them is not measured."""
    asked = pb.ModelInferRequest(model_name=model)
    for name, tensor in zip(NAMES, chosen.inputs(1), strict=True):
        asked.inputs.add(name=name, datatype="INT64", shape=tensor.shape)
        asked.raw_input_contents.append(tensor.numpy().tobytes())
    data = asked.SerializeToString()

    def asking(number: int) -> tuple[Any, Ask]:
        # Else gRPC shares one connection among channels that are alike.
        channel = grpc.aio.insecure_channel(stack.gateway_grpc, [("roost.client", number)])
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        async def ask() -> bool:
            try:
                await infer(data, timeout=_DEADLINE_S)
            except grpc.aio.AioRpcError:
                return False
            return True

        return channel, ask

    made = [asking(number) for number in range(_CLIENTS)]
    try:
        yield [ask for _, ask in made]
    finally:
        for channel, _ in made:
            await channel.close()


# --- turns -----------------------------------------------------------------------------------


async def _saturate(stack: BenchStack, way: _Way, sizes: _Sizes, seconds: float) -> None:
    """All clients, each asking again as soon as it is answered."""
    before, own = stack.cpu_seconds(), time.process_time()
    began = time.perf_counter()
    until = began + seconds

    async def client(ask: Ask) -> int:
        done = 0
        while time.perf_counter() < until:
            if await ask():
                done += 1
            else:
                way.failed += 1
        return done

    sizes.counting = True
    done = sum(await asyncio.gather(*map(client, way.clients)))
    sizes.counting = False
    way.rates.append(done / (time.perf_counter() - began))
    way.answered += done
    after = stack.cpu_seconds()
    for name, seconds_before in before.items():
        way.cpu[name] += after[name] - seconds_before
    way.cpu["clients"] += time.process_time() - own


async def _alone(way: _Way) -> None:
    for _ in range(_CALLS):
        began = time.perf_counter()
        way.failed += not await way.clients[0]()
        way.idle.append(time.perf_counter() - began)


class _BareLoop:
    def __init__(self, made: Registered, chosen: Family, device: str, seed: int) -> None:
        self._device = baseline.device_of(device)
        self._module = baseline.load(made.path, self._device)
        self._inputs = {rows: chosen.inputs(rows) for rows in range(1, chosen.max_batch + 1)}
        self._rng = np.random.default_rng(seed)
        with baseline.steady():
            for rows in (1, 1, chosen.max_batch, chosen.max_batch):
                self._call(rows)

    def saturate(self, measured: _Bare, sizes: Counter[int], seconds: float) -> None:
        """Batches of the sizes that the worker has formed, as often."""
        known = [rows for rows in sizes if rows in self._inputs]
        batches = np.array([sizes[rows] / rows for rows in known])
        order = self._rng.choice(known, size=4096, p=batches / batches.sum())
        began, cpu = time.perf_counter(), time.process_time()
        rows = number = 0
        with baseline.steady():
            while time.perf_counter() - began < seconds:
                rows += self._call(int(order[number % len(order)]))
                number += 1
        measured.rates.append(rows / (time.perf_counter() - began))
        measured.rows += rows
        measured.cpu_s += time.process_time() - cpu

    def alone(self, measured: _Bare) -> None:
        with baseline.steady():
            for _ in range(_CALLS):
                began = time.perf_counter()
                self._call(1)
                measured.idle.append(time.perf_counter() - began)

    def _call(self, rows: int) -> int:
        output: Any = self._module(*(each.to(self._device) for each in self._inputs[rows]))
        torch.Tensor.cpu(output)
        return rows


# --- figures ---------------------------------------------------------------------------------


def _figures(name: str, ways: Sequence[_Way], bare: _Bare, sizes: Counter[int]) -> list[Figure]:
    loop, call = median(bare.rates), median(bare.idle)
    bare_ms = bare.cpu_s / bare.rows * 1e3
    batches = sum(count / rows for rows, count in sizes.items() if rows)
    figures = []
    for way in ways:
        reach = 0.8 if name == _REACH and way.name == "HTTP" else None
        ours = sum(s for part, s in way.cpu.items() if part != "clients") / way.answered * 1e3
        figures += [
            Figure(f"{name}: {way.name}: requests/s over the bare loop's", median(way.rates) / loop,
                   "x", reach, "at least"),
            Figure(f"{name}: {way.name}: one client's p50 beyond the bare call's",
                   (median(way.idle) - call) * 1e3, "ms", 5.0 if way.name == "HTTP" else None),
            Figure(f"{name}: {way.name}: CPU of the bare loop over that of all services",
                   bare_ms / ours, "x"),
            Figure(f"{name}: {way.name}: requests/s", median(way.rates), ""),
            *(Figure(f"… CPU of {part}", seconds / way.answered * 1e3, "ms/request")
              for part, seconds in sorted(way.cpu.items()) if part != "placer"),
            Figure(f"{name}: {way.name}: requests that failed", way.failed, "", 0),
        ]  # fmt: skip
    return [
        *figures,
        Figure(f"{name}: bare loop", loop, "requests/s"),
        Figure("… CPU", bare_ms, "ms/request"),
        Figure("… one call, p50", call * 1e3, "ms"),
        Figure("… rows of a batch, mean", sum(sizes.values()) / max(batches, 1), ""),
    ]
