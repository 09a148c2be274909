"""Requests whose answers are known, over HTTP and AMQP, and a book of what became of each.

A model of this load answers `y = k * x` with a k of its own, so that an answer of another model, or
to another request, is seen to be wrong.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import time
import uuid
import warnings
from collections import Counter
from enum import StrEnum
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import numpy as np
import torch

from benchmarks.asking import acknowledge
from benchmarks.keepalive import Connection, connect, head
from shared.broker.port import Broker, Delivery, Message, PublishUncertain
from shared.errors import RoostError
from shared.models import ModelSpec, TensorSpec
from shared.names import HEADER_CODE, HEADER_DEADLINE, INFER_EXCHANGE, REPLY_QUEUE_PREFIX
from shared.repository import Repository

WIDTH: Final = 4
DEADLINE_S: Final = 20.0
SLACK_S: Final = 10.0
"""After the deadline, within which the answer that it has passed must have come: longer than any
part is suspended."""
_SHOWN: Final = 20


class Verdict(StrEnum):
    """What became of a request."""

    RIGHT = "answered right"
    TOLD = "answered with a clear error"
    CUT = "connection lost before an answer"
    """Over HTTP; the client knows, and can ask again."""
    REFUSED = "not accepted"
    """No connection, or the broker did not confirm: the client knows."""
    UNSURE = "confirmation lost, and no answer"
    WRONG = "answered wrong"
    SILENT = "never answered"
    """Accepted, and no answer by its deadline and `SLACK_S`."""


class Model(msgspec.Struct, frozen=True):
    name: str
    factor: int


class Odd(msgspec.Struct, frozen=True):
    """A request that ended as none should."""

    verdict: Verdict
    way: str
    model: str
    at: float
    """Unix time at which it was asked."""
    detail: str


class Ledger:
    """Counts; what should not be is kept, to be looked into."""

    def __init__(self) -> None:
        self.of: Counter[tuple[str, Verdict]] = Counter()
        """By way (`http`, `amqp`) and verdict."""
        self.codes: Counter[str] = Counter()
        self.doubles = 0
        """Answers beyond the first, over AMQP; over HTTP there can be none."""
        self.odd: list[Odd] = []
        self.slowest_s = 0.0

    def note(self, way: str, verdict: Verdict, model: str, asked: float, detail: str = "") -> None:
        self.of[way, verdict] += 1
        self.slowest_s = max(self.slowest_s, time.time() - asked)
        if verdict is Verdict.TOLD:
            self.codes[detail] += 1
        if verdict in {Verdict.WRONG, Verdict.SILENT} and len(self.odd) < _SHOWN:
            self.odd.append(Odd(verdict, way, model, asked, detail))

    def total(self, *verdicts: Verdict) -> int:
        wanted = verdicts or tuple(Verdict)
        return sum(count for (_, verdict), count in self.of.items() if verdict in wanted)


def register(repository: Repository, count: int) -> list[Model]:
    """Small scripted models, each a file of its own. Blocks; needs torch."""
    spec = ModelSpec(
        inputs=(TensorSpec("x", "FP32", (WIDTH,)),),
        outputs=(TensorSpec("y", "FP32", (WIDTH,)),),
        max_batch_size=16,
    )
    made = []
    for factor in range(2, count + 2):
        name = f"times-{factor:03d}"
        digest, _ = repository.put_blob([_file(factor)])
        repository.register(name, 1, spec, digest)
        made.append(Model(name, factor))
    return made


class _Times(torch.nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((WIDTH,), float(factor)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def _file(factor: int) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted: Any = torch.jit.script(_Times(factor))
        torch.jit.save(scripted, out)
    return out.getvalue()


class Load:
    """Asks at a rate, whatever happens to the parts."""

    def __init__(
        self,
        broker: Broker,
        gateways: list[str],
        models: list[Model],
        rate: float,
        rng: np.random.Generator,
    ) -> None:
        """`rate`: requests per second, of which every second one goes over AMQP."""
        self.ledger = Ledger()
        self._broker = broker
        self._gateways = [urlsplit(url) for url in gateways]
        self._models = models
        self._rate = rate
        self._rng = rng
        weights = 1.0 / np.arange(1, len(models) + 1)
        self._shares = weights / weights.sum()
        self._reply_to = f"{REPLY_QUEUE_PREFIX}faults-{uuid.uuid4().hex[:8]}"
        self._free: list[list[Connection]] = [[] for _ in gateways]
        self._numbers = itertools.count()
        self._waiting: dict[str, asyncio.Future[Message]] = {}
        self._answered: set[str] = set()
        self._asking: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._broker.declare_queue(self._reply_to, expires_s=24 * 3600)
        await self._broker.consume(self._reply_to, self._heard, prefetch=1000)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, and until the last of what was asked has ended, well or not."""
        at = time.perf_counter()
        while not stop.is_set():
            at += float(self._rng.exponential(1 / self._rate))
            if (early := at - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            number = next(self._numbers)
            model = self._models[int(self._rng.choice(len(self._models), p=self._shares))]
            x = [int(each) for each in self._rng.integers(-99, 99, WIDTH)]
            asking = self._by_amqp if number % 2 else self._by_http
            task = asyncio.create_task(asking(number, model, x))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        while self._asking:
            await asyncio.wait(set(self._asking))

    # --- over HTTP ----------------------------------------------------------------------------

    async def _by_http(self, number: int, model: Model, x: list[int]) -> None:
        asked, which = time.time(), number // 2 % len(self._gateways)
        url, body = self._gateways[which], _body(x, timeout_s=DEADLINE_S)
        request = head(model.name, len(body)) + body
        verdict, detail = Verdict.CUT, ""
        for _ in range(2):
            free = self._free[which]
            reused = bool(free)
            try:
                connection = (
                    free.pop() if free else await connect(url.hostname or "", url.port or 0)
                )
            except OSError:
                verdict = Verdict.REFUSED
                break
            sent = time.time()
            try:
                answer = await connection.ask(request, timeout_s=DEADLINE_S + SLACK_S)
            except TimeoutError:
                verdict = Verdict.SILENT
                connection.close()
                break
            if answer.status:
                free.append(connection)
                verdict, detail = _judged(answer.status, answer.body, model, x)
                break
            if not (reused and time.time() - sent < 1.0):
                break
            # An idle connection that its server was closing: clients ask anew.
        self.ledger.note("http", verdict, model.name, asked, detail)

    # --- over AMQP ----------------------------------------------------------------------------

    async def _by_amqp(self, number: int, model: Model, x: list[int]) -> None:
        asked, id_ = time.time(), f"f{number}"
        answer: asyncio.Future[Message] = asyncio.Future()
        self._waiting[id_] = answer
        message = Message(
            body=_body(x),
            headers={HEADER_DEADLINE: int((asked + DEADLINE_S) * 1e3)},
            reply_to=self._reply_to,
            correlation_id=id_,
        )
        sure = True
        try:
            try:
                await self._broker.publish(INFER_EXCHANGE, model.name, message)
            except PublishUncertain:
                sure = False
            except RoostError:
                self.ledger.note("amqp", Verdict.REFUSED, model.name, asked)
                return
            try:
                async with asyncio.timeout(DEADLINE_S + SLACK_S):
                    reply = await answer
            except TimeoutError:
                verdict = Verdict.SILENT if sure else Verdict.UNSURE
                self.ledger.note("amqp", verdict, model.name, asked, id_)
                return
            status = 200 if reply.headers.get(HEADER_CODE) == "ok" else 0
            verdict, detail = _judged(status, reply.body, model, x)
            if verdict is Verdict.TOLD:
                detail = str(reply.headers.get(HEADER_CODE))
            self.ledger.note("amqp", verdict, model.name, asked, detail)
        finally:
            del self._waiting[id_]

    def _heard(self, delivery: Delivery) -> None:
        id_ = delivery.message.correlation_id or ""
        waiting = self._waiting.get(id_)
        if id_ in self._answered:
            # One that was not acknowledged in time comes again: that is the broker's, not an
            # answer more.
            self.ledger.doubles += not delivery.redelivered
        elif waiting is not None and not waiting.done():
            self._answered.add(id_)
            waiting.set_result(delivery.message)
        task = asyncio.ensure_future(acknowledge(delivery))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)


def _body(x: list[int], timeout_s: float | None = None) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": x}
    timeout = {} if timeout_s is None else {"parameters": {"timeout": int(timeout_s * 1e6)}}
    return json.dumps({"inputs": [tensor], **timeout}).encode()


def _judged(status: int, body: bytes, model: Model, x: list[int]) -> tuple[Verdict, str]:
    try:
        told = json.loads(body)
        if status != 200:
            return Verdict.TOLD, f"{status}: {told['error']}"[:40]
        given = told["outputs"][0]["data"]
    except (ValueError, LookupError, TypeError):
        return Verdict.WRONG, repr(body[:80])
    right = [model.factor * each for each in x]
    return (Verdict.RIGHT, "") if given == right else (Verdict.WRONG, f"{given} for {right}")
