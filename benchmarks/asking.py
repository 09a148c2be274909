"""Requests at given times, over AMQP and over HTTP, and what became of each."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Final

import httpx
import msgspec

from benchmarks.worker import HEADER_WORKER
from shared.broker.port import Broker, Delivery, HeaderValue, Message
from shared.errors import RoostError
from shared.names import (
    HEADER_CODE,
    HEADER_DEADLINE,
    HEADER_LENGTH,
    INFER_EXCHANGE,
    REPLY_QUEUE_PREFIX,
)

_CONNECTIONS: Final = 64
_LINGER_S: Final = 10.0
"""Beyond the deadline, for answers that say so."""


class Ask(msgspec.Struct, frozen=True):
    """One request that is to be made."""

    at: float
    """Seconds from the start."""
    model: str
    http: bool = False


class Answer(msgspec.Struct, frozen=True):
    """What became of one."""

    model: str
    asked_at: float
    """Unix time."""
    seconds: float
    code: str
    """`ok`, an error's code, or `lost` when nothing ever came."""
    late_s: float = 0.0
    """By how much it was asked later than planned: the machine's doing, not the stack's."""
    worker: str = ""
    """Who answered; over HTTP nobody learns."""

    @property
    def ok(self) -> bool:
        return self.code == "ok"

    @property
    def answered_at(self) -> float:
        return self.asked_at + self.seconds


class Client:
    """A producer and an HTTP client of one stack. `body` makes the requests' body."""

    def __init__(
        self,
        broker: Broker,
        gateway_url: str,
        body: tuple[bytes, int | None],
        *,
        deadline_s: float,
    ) -> None:
        self._broker = broker
        self._body, self._length = body
        self._deadline_s = deadline_s
        self._reply_to = f"{REPLY_QUEUE_PREFIX}benchmark-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count()
        self._waiting: dict[str, asyncio.Future[tuple[float, str, str]]] = {}
        self._acks: set[asyncio.Task[None]] = set()
        self._http = httpx.AsyncClient(
            base_url=gateway_url,
            timeout=deadline_s + _LINGER_S,
            trust_env=False,
            limits=httpx.Limits(
                max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS
            ),
        )

    async def start(self) -> None:
        await self._broker.declare_queue(self._reply_to, expires_s=600)
        await self._broker.consume(self._reply_to, self._heard, prefetch=1000)

    async def close(self) -> None:
        await self._http.aclose()
        await self._broker.close()

    async def ask(self, model: str, *, http: bool = False, late_s: float = 0.0) -> Answer:
        """One request, until it is answered or given up."""
        asked_at, began = time.time(), time.perf_counter()
        ended, code, worker = await (self._by_http(model) if http else self._by_amqp(model))
        return Answer(model, asked_at, ended - began, code, late_s, worker)

    async def play(
        self, asks: Sequence[Ask], on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """All of them at their times (ascending), however slowly the earlier ones are answered.
        The answers, in the order of the requests."""
        start = time.perf_counter()

        async def one(ask: Ask, late_s: float) -> Answer:
            answer = await self.ask(ask.model, http=ask.http, late_s=late_s)
            if on_answer is not None:
                on_answer(answer)
            return answer

        async with asyncio.TaskGroup() as group:
            tasks = []
            for ask in asks:
                early = start + ask.at - time.perf_counter()
                if early > 0:
                    await asyncio.sleep(early)
                tasks.append(group.create_task(one(ask, max(-early, 0.0))))
        return [task.result() for task in tasks]

    async def _by_amqp(self, model: str) -> tuple[float, str, str]:
        number = str(next(self._numbers))
        answer: asyncio.Future[tuple[float, str, str]] = asyncio.Future()
        self._waiting[number] = answer
        headers: dict[str, HeaderValue] = {
            HEADER_DEADLINE: int((time.time() + self._deadline_s) * 1e3)
        }
        if self._length is not None:
            headers[HEADER_LENGTH] = str(self._length)
        message = Message(
            body=self._body,
            headers=headers,
            reply_to=self._reply_to,
            correlation_id=number,
            persistent=False,
        )
        try:
            await self._broker.publish(INFER_EXCHANGE, model, message)
            async with asyncio.timeout(self._deadline_s + _LINGER_S):
                return await answer
        except TimeoutError:
            return time.perf_counter(), "lost", ""
        except RoostError as error:
            return time.perf_counter(), error.code, ""
        finally:
            self._waiting.pop(number, None)

    async def _by_http(self, model: str) -> tuple[float, str, str]:
        headers = {"Content-Type": "application/octet-stream"}
        if self._length is not None:
            headers[HEADER_LENGTH] = str(self._length)
        try:
            response = await self._http.post(
                f"/v2/models/{model}/infer", content=self._body, headers=headers
            )
        except httpx.HTTPError as error:
            return time.perf_counter(), type(error).__name__, ""
        code = "ok" if response.status_code == httpx.codes.OK else str(response.status_code)
        return time.perf_counter(), code, ""

    def _heard(self, delivery: Delivery) -> None:
        message = delivery.message
        answer = self._waiting.get(message.correlation_id or "")
        if answer is not None and not answer.done():
            code = str(message.headers.get(HEADER_CODE, "none"))
            worker = str(message.headers.get(HEADER_WORKER, ""))
            answer.set_result((time.perf_counter(), code, worker))
        task = asyncio.ensure_future(acknowledge(delivery))
        self._acks.add(task)
        task.add_done_callback(self._acks.discard)


async def acknowledge(delivery: Delivery) -> None:
    """An answer that cannot be acknowledged comes again, and is dropped then."""
    try:
        await delivery.ack()
    except RoostError:
        return
