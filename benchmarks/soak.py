"""24 hours worth of loading and evicting, compressed: nothing may grow.

A worker that changes one model every 30 s does so 2,880 times a day. Here it does that as fast as
it can, through the real stack: on one worker there is room for a quarter of the models, and each is
asked in turn, over HTTP, AMQP and gRPC, so that every request loads its model and evicts another.
Models that nobody asks for lose their queue after a second, so queues, bindings and consumers come
and go too. Now and then there is a job, a client that hangs up, and a model that is unloaded and
loaded again.

Everything that could grow is sampled meanwhile; benchmarks/growth.py has the rule by which it does
not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final, Self

import grpc.aio
import httpx
import msgspec

from benchmarks import baseline, growth
from benchmarks.asking import acknowledge
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.soakmodels import WIDTH, SoakModel, body, register
from benchmarks.soakstack import SoakStack
from roost.stack.port import StackConfig
from services.gateway.grpc import inference_pb2 as pb
from shared.broker.port import Broker, Delivery, Message
from shared.names import INFER_EXCHANGE, REPLY_QUEUE_PREFIX

DAY: Final = 2880
"""Model changes of one worker in 24 h, one every 30 s."""
CYCLES: Final = 3600
SAMPLES: Final = 120
_DEADLINE_S: Final = 60.0
_BUDGET: Final = 5 << 20
"""Of a device: four of the models, each with 1 MiB of weights."""
_ALIKE, _OWN, _WRITING = 8, 5, 3
_SETTINGS: Final = {
    # As soon as the policy allows: the next request comes in a fraction of a second.
    "ROOST_PLACER_VICTIM_IDLE_S": "0.05",
    "ROOST_PLACER_VICTIM_MIN_AGE_S": "0.05",
    "ROOST_PLACER_DEACTIVATE_AFTER_S": "1",
}
_LIMITS: Final[tuple[tuple[str, float], ...]] = (
    # By the ends of the series' names; growth per 1,000 cycles that must be ruled out. Models'
    # queues come and go by the dozen: less than 2 is lost in that. Each cycle makes and unmakes
    # some of them, so what stayed behind would be there hundreds of times.
    ("private bytes", 1 << 19),
    ("shared bytes", 1 << 19),
    ("Python objects", 500.0),
    ("Python blocks", 1000.0),
    ("open files", 0.25),
    ("threads", 0.25),
    ("RabbitMQ: queues", 2.0),
    ("RabbitMQ: exchanges", 0.25),
    ("RabbitMQ: bindings", 2.0),
    ("RabbitMQ: connections", 0.25),
    ("RabbitMQ: channels", 0.25),
    ("RabbitMQ: consumers", 2.0),
    ("RabbitMQ: messages", 2.0),
    ("Redis: keys", 0.5),
    ("Redis: connections", 0.5),
    ("Redis: bytes", 64 << 10),
    ("repository: files", 0.5),
    ("repository: bytes", 4 << 10),
    ("services' data: files", 0.5),
    ("services' data: bytes", 4 << 10),
)


class Soaked(msgspec.Struct):
    """What was counted, and every sample of everything."""

    cycles: int = 0
    answered: int = 0
    wrong: list[str] = []
    """Answers that were not what the model gives; shown, so that they can be looked into."""
    loads: float = 0.0
    evictions: float = 0.0
    engines_lost: float = 0.0
    jobs: int = 0
    hung_up: int = 0
    reloaded: int = 0
    at: list[int] = []
    """Cycles after which samples were taken."""
    series: dict[str, list[float]] = {}
    types: dict[str, dict[str, int]] = {}
    """By service, the Python types of which there were more at the end than after a third."""
    seconds: float = 0.0


async def run(device: str, *, cycles: int = CYCLES) -> Outcome:
    began = time.monotonic()
    soaked = await measure(cycles)
    return Outcome(
        "soak",
        what(soaked),
        machine(*baseline.described(device)),
        tuple(figures(soaked)),
        time.monotonic() - began,
        now(),
    )


def what(soaked: Soaked) -> str:
    """The run in a sentence."""
    return (
        f"{soaked.cycles:,} model changes of one worker, {soaked.cycles / DAY:.1f} days' worth at "
        "one every 30 s; growth is per 1,000 of them, after the first third, upper end of 95 %"
    )


def figures(soaked: Soaked) -> list[Figure]:
    told = [
        Figure("answers that were wrong or errors", len(soaked.wrong), "", 0),
        Figure("requests answered right", soaked.answered),
        Figure("loads", soaked.loads, "", soaked.cycles * 0.9, "at least"),
        Figure("evictions", soaked.evictions, "", soaked.cycles * 0.9, "at least"),
        Figure("engines lost", soaked.engines_lost, "", 0),
        Figure("jobs run and removed", soaked.jobs),
        Figure("clients that hung up", soaked.hung_up),
        Figure("models unloaded and loaded again", soaked.reloaded),
        Figure("seconds per cycle", soaked.seconds / max(soaked.cycles, 1), "s"),
    ]
    for name, values in soaked.series.items():
        found = growth.slope(soaked.at, values)
        limit = next((most for ending, most in _LIMITS if name.endswith(ending)), None)
        told.append(Figure(f"{name}: growth", found.high, "", limit))
        told.append(Figure(f"… {_level(found)}", found.slope))
    return told


def _level(found: growth.Slope) -> str:
    return f"median slope; was {found.first:,.0f}, is {found.last:,.0f}"


async def measure(cycles: int, *, samples: int = SAMPLES, folder: Path | None = None) -> Soaked:
    """So many cycles, with so many samples at even distances, the first before any."""
    soaked = Soaked()
    async with _running(folder) as stack, contextlib.AsyncExitStack() as ends:
        models = await asyncio.to_thread(
            register, stack.repository, alike=_ALIKE, own=_OWN, writing=_WRITING
        )
        client = await ends.enter_async_context(_Client(stack))
        for model in models:  # each has been there once
            await client.visit(model, soaked)
        soaked.answered = 0
        before = await stack.counters()
        began, third = time.monotonic(), stack.types
        every = max(cycles // samples, 1)
        for cycle, model in zip(range(1, cycles + 1), itertools.cycle(models), strict=False):
            await client.visit(model, soaked)
            soaked.cycles = cycle
            if cycle % 20 == 0:
                await client.extra(cycle // 20, model, soaked)
            if cycle % every == 0:
                await _sample(stack, soaked)
                if len(soaked.at) == samples // 3:
                    third = dict(stack.types)
        soaked.types = {name: _more(third[name], now_) for name, now_ in stack.types.items()}
        soaked.seconds = time.monotonic() - began
        after = await stack.counters()
        soaked.loads, soaked.evictions, soaked.engines_lost = (
            after[name] - before[name] for name in ("loads", "evictions", "engine_restarts")
        )
    return soaked


def _more(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    more = {name: count - before.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in sorted(more.items()) if count > 0}


async def _sample(stack: SoakStack, soaked: Soaked) -> None:
    soaked.at.append(soaked.cycles)
    for name, value in (await stack.sample()).items():
        soaked.series.setdefault(name, []).append(value)
    print(f"  {soaked.cycles} cycles", flush=True)


@contextlib.asynccontextmanager
async def _running(folder: Path | None) -> AsyncIterator[SoakStack]:
    with tempfile.TemporaryDirectory(prefix="roost-soak-") as scratch:
        config = StackConfig(
            data_dir=folder or Path(scratch),
            workers=1,
            budget_bytes=_BUDGET,
            device="cpu",
            settings=_SETTINGS,
        )
        stack = SoakStack(config)
        try:
            await stack.start()
            yield stack
        finally:
            await asyncio.shield(stack.close())


class _Client:
    """Asks by every way in turn, and knows what the answer must be."""

    def __init__(self, stack: SoakStack) -> None:
        self._stack = stack
        self._http = httpx.AsyncClient(
            base_url=stack.gateway_url, timeout=_DEADLINE_S, trust_env=False
        )
        self._channel = grpc.aio.insecure_channel(stack.gateway_grpc)
        self._infer = self._channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        self._broker: Broker | None = None
        self._reply_to = f"{REPLY_QUEUE_PREFIX}soak"
        self._waiting: dict[str, asyncio.Future[Message]] = {}
        self._acks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._ways = itertools.cycle((self._by_http, self._by_amqp, self._by_grpc))

    async def __aenter__(self) -> Self:
        self._broker = await self._stack.producer()
        await self._broker.declare_queue(self._reply_to, expires_s=600)
        await self._broker.consume(self._reply_to, self._heard, prefetch=10)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._channel.close()
        assert self._broker is not None
        await self._broker.close()

    async def visit(self, model: SoakModel, soaked: Soaked) -> None:
        """One request to a model that is not there."""
        number, ask = next(self._numbers), next(self._ways)
        x = [number % 97 + each for each in range(WIDTH)]
        try:
            given = await ask(model, x)
        except (httpx.HTTPError, grpc.aio.AioRpcError, LookupError, ValueError) as error:
            soaked.wrong.append(f"{ask.__name__} {model.name}: {error!r}"[:300])
            return
        if list(given) == model.answer(x):
            soaked.answered += 1
        else:
            soaked.wrong.append(f"{ask.__name__} {model.name}: {given} for {x}"[:300])

    async def extra(self, number: int, model: SoakModel, soaked: Soaked) -> None:
        """What else comes and goes."""
        x = [1] * WIDTH
        match number % 3:
            case 0:
                told = await self._http.post(f"/v2/models/{model.name}/jobs", content=body(x))
                where = told.raise_for_status().headers["location"]
                while (  # noqa: ASYNC110  (it is asked over HTTP)
                    await self._http.get(f"{where}/result")
                ).status_code != httpx.codes.OK:
                    await asyncio.sleep(0.02)
                (await self._http.delete(where)).raise_for_status()
                soaked.jobs += 1
            case 1:
                asking = asyncio.create_task(self._by_http(model, x))
                await asyncio.sleep(0.001)
                asking.cancel()
                await asyncio.wait([asking])
                soaked.hung_up += 1
            case _:
                for action in ("unload", "load"):
                    path = f"/v2/repository/models/{model.name}/{action}"
                    (await self._http.post(path)).raise_for_status()
                soaked.reloaded += 1

    async def _by_http(self, model: SoakModel, x: list[int]) -> Sequence[float]:
        answer = await self._http.post(f"/v2/models/{model.name}/infer", content=body(x))
        given: list[float] = answer.raise_for_status().json()["outputs"][0]["data"]
        return given

    async def _by_grpc(self, model: SoakModel, x: list[int]) -> Sequence[float]:
        asked = pb.ModelInferRequest(model_name=model.name)
        tensor = asked.inputs.add(name="x", datatype="FP32", shape=[1, WIDTH])
        tensor.contents.fp32_contents.extend(x)
        answer = await self._infer(asked, timeout=_DEADLINE_S)
        if answer.raw_output_contents:
            return memoryview(answer.raw_output_contents[0]).cast("f").tolist()
        return list(answer.outputs[0].contents.fp32_contents)

    async def _by_amqp(self, model: SoakModel, x: list[int]) -> Sequence[float]:
        assert self._broker is not None
        id_ = str(next(self._numbers))
        answer = self._waiting[id_] = asyncio.Future()
        try:
            message = Message(body=body(x), reply_to=self._reply_to, correlation_id=id_)
            await self._broker.publish(INFER_EXCHANGE, model.name, message)
            async with asyncio.timeout(_DEADLINE_S):
                given: list[float] = json.loads((await answer).body)["outputs"][0]["data"]
        except TimeoutError as error:
            raise LookupError("no answer") from error
        finally:
            del self._waiting[id_]
        return given

    def _heard(self, delivery: Delivery) -> None:
        answer = self._waiting.get(delivery.message.correlation_id or "")
        if answer is not None and not answer.done():
            answer.set_result(delivery.message)
        task = asyncio.ensure_future(acknowledge(delivery))
        self._acks.add(task)
        task.add_done_callback(self._acks.discard)
