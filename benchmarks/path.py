"""What a request costs on its way, stage by stage: processor time of gateway, worker and broker.

One real stack, asked over keep-alive connections by as many clients as requests shall be under
way, then over AMQP with a given number of requests in each message, so that the worker's figure
does not depend on how many a gateway gathers. The executor takes its times from a table, on a
thread of its own: what is told of the worker is its agent's main thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, cast

import httpx
import msgspec
import psutil

from benchmarks import baseline
from benchmarks.measured import Spent
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.stack import BenchStack
from benchmarks.table import Table, register, request
from roost.stack.port import StackConfig
from shared import packs
from shared.broker.port import Broker, Delivery, HeaderValue, Message
from shared.names import HEADER_LENGTH, HEADER_PACKS, INFER_EXCHANGE, REPLY_QUEUE_PREFIX

_MODEL: Final = "path"
_BATCH: Final = 32
_TABLE: Final = Table(cases=((1, 0.0002), (_BATCH, 0.0004)), load_seconds=0.05)
_LEVELS: Final = (1, 32, 500)
"""Requests under way, over HTTP."""
_PER_MESSAGE: Final = (1, 8, 32)
"""Requests in a message, over AMQP."""
_UNDER_WAY: Final = 256
"""Requests under way, over AMQP."""
_WARM_S: Final = 1.5
_MEASURE_S: Final = 3.0
_GATEWAY: Final = "gateway"
_WORKER: Final = "worker-0"
_REACH_US: Final = 150.0

Ask = Callable[[float], Awaitable[int]]
"""Asks until that time (of `perf_counter`); returns how many requests were answered."""


class Taken(msgspec.Struct, frozen=True):
    """Of one kind of load: microseconds per request."""

    rate: float
    """Requests per second."""
    cpu: dict[str, float]
    """By process, without the stages' clocks."""
    stages: dict[str, dict[str, float]]
    """By service and stage."""


async def run(device: str) -> Outcome:
    began = time.monotonic()
    figures = await measure()
    what = (
        f"processor time per request, {_MEASURE_S:g} s each over HTTP and AMQP; batches of up to "
        f"{_BATCH}, 4 numbers in and out, executors by a table"
    )
    ran_on = machine(*baseline.described(device))
    return Outcome("path", what, ran_on, tuple(figures), time.monotonic() - began, now())


async def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="roost-path-") as folder:
        config = StackConfig(
            data_dir=Path(folder), workers=1, budget_bytes=64 << 20, device="cpu",
            settings={"ROOST_GATEWAY_MODEL_INFLIGHT_LIMIT": "2000"},
        )  # fmt: skip
        stack = _Stack(config, table=True)
        try:
            await stack.start()
            await asyncio.to_thread(register, stack.repository, _MODEL, _TABLE, target_ms=100.0)
            return await _measure(stack)
        finally:
            await asyncio.shield(stack.close())


async def _measure(stack: _Stack) -> list[Figure]:
    await _awake(stack)
    figures: list[Figure] = []
    packed: dict[int, Taken] = {}
    async with contextlib.AsyncExitStack() as ends:
        broker = await stack.producer()
        ends.push_async_callback(broker.close)
        producer = _Producer(broker)
        await producer.start()
        for size in _PER_MESSAGE:
            packed[size] = await _taken(stack, producer.asking(size, _UNDER_WAY))
        http = {level: await _taken(stack, _asking(stack, level)) for level in _LEVELS}
    told = packed[_BATCH].cpu[_WORKER]
    figures.append(Figure(f"worker, at {_BATCH} per message", told, "µs", _REACH_US))
    for size, taken in packed.items():
        figures += _figures(f"AMQP, {size} per message", taken, (_WORKER, "broker"))
    for level, taken in http.items():
        figures += _figures(f"HTTP, {level} under way", taken, (_GATEWAY, _WORKER, "broker"))
    return figures


def _figures(name: str, taken: Taken, processes: tuple[str, ...]) -> Iterator[Figure]:
    yield Figure(f"{name}: rate", taken.rate, "requests/s")
    for process in processes:
        yield Figure(f"{name}: {process}, in all", taken.cpu[process], "µs")
        stages = taken.stages.get(process, {})
        for stage, value in sorted(stages.items(), key=lambda each: -each[1]):
            yield Figure(f"… {stage}", value, "µs")


async def _taken(stack: _Stack, ask: Ask) -> Taken:
    """First without the stages' clocks, then with them, which take something too."""
    await ask(time.perf_counter() + _WARM_S)
    before, began = await stack.spent(), time.perf_counter()
    answered = await ask(began + _MEASURE_S)
    took, after = time.perf_counter() - began, await stack.spent()
    cpu = {name: (after[name].cpu_s - before[name].cpu_s) / answered * 1e6 for name in after}
    stack.turn_clocks()
    before = await stack.spent()
    timed = await ask(time.perf_counter() + _MEASURE_S)
    after = await stack.spent()
    stack.turn_clocks()
    stages = {}
    for name, spent in after.items():
        if not spent.stages:
            continue
        by_stage = {
            stage: (seconds - before[name].stages.get(stage, 0.0)) / timed * 1e6
            for stage, seconds in spent.stages.items()
        }
        whole = (spent.cpu_s - before[name].cpu_s) / timed * 1e6
        by_stage["loop, sockets, the rest"] = whole - sum(by_stage.values())
        by_stage["(more with the stages' clocks)"] = whole - cpu[name]
        stages[name] = by_stage
    return Taken(answered / took, cpu, stages)


class _Stack(BenchStack):
    """A stack whose gateway and worker are `benchmarks.measured`."""

    def _command(self, name: str) -> list[str]:
        service = name.partition("-")[0]
        if service not in {"gateway", "worker"}:
            return super()._command(name)
        return [
            *(sys.executable, "-m", "benchmarks.measured", service),
            *("--to", str(self._file(name))),
        ]

    def _file(self, name: str) -> Path:
        return self._logs / f"{name}.spent"

    def turn_clocks(self) -> None:
        for name in (_GATEWAY, _WORKER):
            psutil.Process(self.pids()[name]).send_signal(signal.SIGUSR2)

    async def spent(self) -> dict[str, Spent]:
        """Of the services and the broker, until now."""
        found = {name: await self._spent(name) for name in (_GATEWAY, _WORKER)}
        assert self._rabbit is not None
        assert self._rabbit.pid is not None
        node = psutil.Process(self._rabbit.pid)
        found["broker"] = Spent(
            sum(sum(each.cpu_times()[:2]) for each in (node, *node.children(recursive=True)))
        )
        return found

    async def _spent(self, name: str) -> Spent:
        path = self._file(name)
        before = _read(path).number
        psutil.Process(self.pids()[name]).send_signal(signal.SIGUSR1)
        async with asyncio.timeout(30):
            while (spent := _read(path)).number == before:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.005)
        return spent


def _read(path: Path) -> Spent:
    return msgspec.json.decode(path.read_bytes(), type=Spent) if path.exists() else Spent(0.0)


async def _awake(stack: BenchStack) -> None:
    """Until the model answers."""
    body, length = request()
    async with httpx.AsyncClient(timeout=30.0, trust_env=False) as client:
        async with asyncio.timeout(60):
            while True:
                answer = await client.post(
                    f"{stack.gateway_url}/v2/models/{_MODEL}/infer",
                    content=body,
                    headers={HEADER_LENGTH: str(length)},
                )
                if answer.status_code == httpx.codes.OK:
                    return
                await asyncio.sleep(0.2)


# --- over HTTP ------------------------------------------------------------------------------


def _asking(stack: BenchStack, clients: int) -> Ask:
    url = httpx.URL(stack.gateway_url)
    port = url.port or 80
    body, length = request()
    sent = (
        f"POST /v2/models/{_MODEL}/infer HTTP/1.1\r\nHost: {url.host}:{port}\r\n"
        f"Content-Length: {len(body)}\r\n{HEADER_LENGTH}: {length}\r\n\r\n"
    ).encode() + body

    async def ask(until: float) -> int:
        loop = asyncio.get_running_loop()
        made = []
        for _ in range(clients):
            _, client = await loop.create_connection(lambda: _Client(sent, until), url.host, port)
            made.append(client)
        for client in made:
            client.ask()
        await asyncio.gather(*(client.over for client in made))
        return sum(client.answered for client in made)

    return ask


class _Client(asyncio.Protocol):
    """One keep-alive connection that asks again at once. As little as that can be: it shares the
    machine with what is measured."""

    def __init__(self, sent: bytes, until: float) -> None:
        self.answered = 0
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sent = sent
        self._until = until
        self._came = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self) -> None:
        assert self._transport is not None
        self._transport.write(self._sent)

    def data_received(self, data: bytes) -> None:
        self._came += data
        head = self._came.find(b"\r\n\r\n")
        if head < 0:
            return
        at = self._came.lower().find(b"content-length:", 0, head)
        end = self._came.find(b"\r\n", at)
        size = int(self._came[at + len(b"content-length:") : end])
        if len(self._came) < head + 4 + size:
            return
        if not self._came.startswith(b"HTTP/1.1 200"):
            self._end(RuntimeError(f"the gateway answered {self._came[:200]!r}"))
            return
        self._came = b""
        self.answered += 1
        if time.perf_counter() < self._until:
            self.ask()
        else:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionError("the gateway hung up"))

    def _end(self, error: Exception | None) -> None:
        if self.over.done():
            return
        if error is None:
            self.over.set_result(None)
        else:
            self.over.set_exception(error)
        assert self._transport is not None
        self._transport.close()


# --- over AMQP ------------------------------------------------------------------------------


class _Producer:
    """Messages of several requests each, as many under way as told."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._reply_to = f"{REPLY_QUEUE_PREFIX}path-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count()
        self._room = asyncio.Event()
        self._under_way = 0
        self._answered = 0
        self._acks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._broker.declare_queue(self._reply_to, expires_s=600)
        await self._broker.consume(self._reply_to, self._heard, prefetch=1000)

    def asking(self, per_message: int, under_way: int) -> Ask:
        body, length = request()
        headers: dict[str, HeaderValue] = {HEADER_LENGTH: length, HEADER_PACKS: True}

        async def send() -> None:
            members = [
                Message(
                    body=body,
                    headers=headers,
                    reply_to=self._reply_to,
                    correlation_id=str(next(self._numbers)),
                )
                for _ in range(per_message)
            ]
            await self._broker.publish(INFER_EXCHANGE, _MODEL, packs.pack(members))

        async def ask(until: float) -> int:
            before = self._answered
            async with asyncio.TaskGroup() as group:
                while time.perf_counter() < until:
                    if self._under_way + per_message > under_way:
                        self._room.clear()
                        await self._room.wait()
                        continue
                    self._under_way += per_message
                    group.create_task(send())
                    await asyncio.sleep(0)
            while self._under_way:
                self._room.clear()
                await self._room.wait()
            return self._answered - before

        return ask

    def _heard(self, delivery: Delivery) -> None:
        message = delivery.message
        answers = len(packs.members(message)) if packs.is_pack(message) else 1
        self._answered += answers
        self._under_way -= answers
        self._room.set()
        task = asyncio.ensure_future(delivery.ack())
        self._acks.add(task)
        task.add_done_callback(self._acks.discard)
