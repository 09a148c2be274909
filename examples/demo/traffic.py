"""Requests of the demo: over HTTP through the gateway, and over AMQP past it."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Final

import httpx
import msgspec
import numpy as np
import numpy.typing as npt

from examples.demo.models import difference
from shared import names, v2
from shared.broker.port import Broker, Delivery, Message
from shared.errors import RoostError
from shared.tensors import from_numpy, to_numpy

Vectors = npt.NDArray[np.float32]
TOLERANCE: Final = 0.02
"""Answers are unit vectors. The same model in another batch rounds bfloat16 differently (seen:
below 0.01); another fine-tune's answer lies 0.6 away."""


class Answer(msgspec.Struct, frozen=True):
    """One request, as its sender saw it. Times are `time.monotonic()` seconds."""

    model: str
    asked: float
    answered: float
    wrong: bool
    error: str | None = None

    @property
    def seconds(self) -> float:
        return self.answered - self.asked


class Book:
    """All answers so far, and what each model should have said."""

    def __init__(self, inputs: dict[str, npt.NDArray[np.int64]]) -> None:
        self._inputs = inputs
        self.expected: dict[str, Vectors] = {}
        self.answers: dict[str, list[Answer]] = defaultdict(list)

    def request(self, row: int) -> tuple[bytes, int | None]:
        """The v2 body for one sentence, tensors in binary; the same bytes for HTTP and AMQP."""
        return v2.encode_request(
            v2.InferRequest(
                id=None,
                parameters={},
                inputs=tuple(
                    from_numpy(name, array[row : row + 1]) for name, array in self._inputs.items()
                ),
                outputs=None,
                binary_default=True,
            )
        )

    def record(
        self, model: str, row: int, asked: float, body: bytes, header_length: int | None
    ) -> Answer:
        """Decodes a response and holds it against what torch said."""
        answered = time.monotonic()
        vector = to_numpy(v2.decode_response(body, header_length).outputs[0])
        expected = self.expected[model][row % len(self.expected[model])]
        wrong = vector.shape != (1, expected.size) or difference(vector, expected) > TOLERANCE
        return self._add(Answer(model, asked, answered, wrong))

    def record_error(self, model: str, asked: float, error: str) -> Answer:
        return self._add(Answer(model, asked, time.monotonic(), wrong=False, error=error))

    def between(self, start: float, end: float, models: AbstractSet[str]) -> list[Answer]:
        """Answers to what was asked in that time."""
        return [a for m in models for a in self.answers[m] if start <= a.asked < end]

    def all(self) -> list[Answer]:
        return [answer for answers in self.answers.values() for answer in answers]

    def _add(self, answer: Answer) -> Answer:
        self.answers[answer.model].append(answer)
        return answer


class HttpTraffic:
    """Sends sentences through the gateway."""

    def __init__(self, url: str, book: Book) -> None:
        self._book = book
        self._client = httpx.AsyncClient(
            base_url=url,
            timeout=90.0,
            trust_env=False,
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=64),
        )

    async def ask(self, model: str, row: int) -> Answer:
        body, length = self._book.request(row)
        asked = time.monotonic()
        try:
            response = await self._client.post(
                f"/v2/models/{model}/infer",
                content=body,
                headers={names.HEADER_LENGTH: str(length)},
            )
        except httpx.HTTPError as error:
            return self._book.record_error(model, asked, repr(error))
        if response.status_code != httpx.codes.OK:
            return self._book.record_error(model, asked, response.text)
        header = response.headers.get(names.HEADER_LENGTH)
        return self._book.record(
            model, row, asked, response.content, int(header) if header else None
        )

    async def keep_asking(self, models: Sequence[str], per_second: float, rows: int) -> None:
        """Asks the models in turn, evenly spaced in time, until cancelled. Does not wait for
        answers before it asks again: a slow answer must not thin out the load."""
        async with asyncio.TaskGroup() as group:
            begun, sent = time.monotonic(), 0
            while True:
                await asyncio.sleep(max(0.0, begun + sent / per_second - time.monotonic()))
                model = models[sent % len(models)]
                group.create_task(self.ask(model, sent // len(models) % rows))
                sent += 1

    async def close(self) -> None:
        await self._client.aclose()


class AmqpTraffic:
    """A producer that publishes to RabbitMQ directly and reads its own reply queue."""

    def __init__(self, broker: Broker, book: Book) -> None:
        self._broker = broker
        self._book = book
        self._reply_to = f"{names.REPLY_QUEUE_PREFIX}demo-{uuid.uuid4().hex[:8]}"
        self._asked: dict[str, tuple[str, int, float, asyncio.Future[None]]] = {}

    async def start(self) -> None:
        await self._broker.declare_queue(self._reply_to, expires_s=120)
        await self._broker.consume(self._reply_to, self._on_reply, prefetch=256)

    async def send(self, model: str, row: int) -> asyncio.Future[None]:
        """Publishes one request; the future is done when its answer was recorded."""
        body, length = self._book.request(row)
        key = uuid.uuid4().hex
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asked = time.monotonic()
        self._asked[key] = (model, row, asked, done)
        try:
            await self._broker.publish(
                names.INFER_EXCHANGE,
                model,
                Message(
                    body=body,
                    headers={names.HEADER_LENGTH: length},
                    reply_to=self._reply_to,
                    correlation_id=key,
                ),
            )
        except RoostError as error:
            self._asked.pop(key, None)
            self._book.record_error(model, asked, str(error))
            done.set_result(None)
        return done

    async def spike(self, model: str, per_second: float, seconds: float, rows: int) -> None:
        """Publishes at this rate, then waits for the last answer."""
        begun = time.monotonic()
        sending: set[asyncio.Task[asyncio.Future[None]]] = set()
        for number in range(int(per_second * seconds)):
            await asyncio.sleep(max(0.0, begun + number / per_second - time.monotonic()))
            sending.add(asyncio.create_task(self.send(model, number % rows)))
        async with asyncio.timeout(60):
            await asyncio.gather(*[await task for task in sending])

    def _on_reply(self, delivery: Delivery) -> None:
        message = delivery.message
        known = self._asked.pop(message.correlation_id or "", None)
        if known is not None:
            model, row, asked, done = known
            if message.headers.get(names.HEADER_CODE) == "ok":
                length = message.headers.get(names.HEADER_LENGTH)
                self._book.record(
                    model, row, asked, message.body, None if length is None else int(str(length))
                )
            else:
                self._book.record_error(model, asked, message.body.decode(errors="replace"))
            done.set_result(None)
        task = asyncio.ensure_future(delivery.ack())
        task.add_done_callback(lambda t: t.cancelled() or t.exception())

    async def close(self) -> None:
        with contextlib.suppress(RoostError):
            await self._broker.close()


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies; NaN of none."""
    return float(np.quantile(values, share)) if values else float("nan")
