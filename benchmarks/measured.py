"""`python -m benchmarks.measured gateway|worker --to FILE`: a service that knows what it spends.

Functions of each stage of a request are wrapped; what they take of the main thread's processor
time, without what they call of other stages, is added up. SIGUSR2 turns the wrapping's clocks on
or off, SIGUSR1 writes the sums. Whoever sums up while the clocks are off learns what the service
takes without them. A worker's executor is `benchmarks.table`'s, in a thread that is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import os
import signal
import socket
import threading
import time
import types
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from benchmarks.table import TableEngine
from services.gateway import app as gateway
from services.gateway import httpinfer, infer, rpc
from services.gateway.config import GatewayConfig
from services.worker import agent, answers, consume, items, line, reply, report, runtime
from services.worker import app as worker
from services.worker.arena import Arena
from services.worker.config import WorkerConfig
from services.worker.core.worker import WorkerCore
from services.worker.launch import EngineProcess, hide_from_engines
from shared import v2
from shared.broker import channels, consumer, frames, publisher
from shared.config import load_or_exit
from shared.logs import configure
from shared.supervise import run_service

Stage = tuple[object, str, str]
"""Who has the function, its name, and the stage that it is of."""

FRAMES: Final = "AMQP frames in"
PUBLISH: Final = "publish"
ACK: Final = "acknowledge"
_COMMON: Final[Sequence[Stage]] = (
    (frames.TolerantFrameReceiver, "get_frame", FRAMES),
    (channels.ConsumeChannel, "_on_deliver_frame", FRAMES),
    (channels.PublishChannel, "_on_confirm_frame", "confirm"),
    (consumer, "decode_message", "properties"),
    (publisher.Publisher, "publish", PUBLISH),
    (consumer.AmqpDelivery, "ack", ACK),
)
_GATEWAY: Final[Sequence[Stage]] = (
    (HttpToolsProtocol, "data_received", "HTTP parse"),
    (RequestResponseCycle, "run_asgi", "ASGI, answer"),
    (infer.Inference, "answer", "inference"),
    (httpinfer.HttpAsked, "read", "body, v2 decode"),
    (v2, "check_inputs", "v2 check"),
    (rpc.Rpc, "call", "rpc"),
    (rpc.Rpc, "_on_reply", "reply in"),
    (rpc.Rpc, "acknowledge_replies", ACK),
)
_WORKER: Final[Sequence[Stage]] = (
    (consume.Consumers, "_on_delivery", "v2 decode, check"),
    (items.Items, "take", "v2 decode, check"),
    (agent.Agent, "_notice", "core"),
    (WorkerCore, "handle", "core"),
    (runtime.Runtime, "run_batch", "gather"),
    (line.Line, "_read", "engine's answer"),
    (answers, "parts", "cut"),
    (agent.Agent, "_answer", "encode answer"),
    (reply.Replier, "answer", "encode answer"),
    (reply, "encode_response", "encode answer"),
    (reply.Replier, "_settle", "reply"),
    (report.Reporter, "_send", "heartbeat"),
)


class Spent(msgspec.Struct):
    """Since the service began; whoever wants a rate takes the difference of two."""

    cpu_s: float
    """Of the main thread."""
    stages: dict[str, float] = {}
    """Seconds of it, while the clocks were on."""
    number: int = 0
    """Of this writing."""


class Clocks:
    """The sums by stage, and which stage is on now."""

    def __init__(self) -> None:
        self.on = False
        self.sums: dict[str, int] = {}
        self._stack: list[str] = []
        self._since = 0

    def enter(self, stage: str) -> None:
        now = time.thread_time_ns()
        if self._stack:
            above = self._stack[-1]
            self.sums[above] = self.sums.get(above, 0) + now - self._since
        self._stack.append(stage)
        self._since = now

    def leave(self) -> None:
        now = time.thread_time_ns()
        stage = self._stack.pop()
        self.sums[stage] = self.sums.get(stage, 0) + now - self._since
        self._since = now

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """The function, by the clock; of a coroutine each of its turns."""
        if inspect.iscoroutinefunction(function):

            async def turns(*args: Any, **kwargs: Any) -> Any:
                return await self._turns(function(*args, **kwargs), stage)

            return turns

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            self.enter(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call

    @types.coroutine
    def _turns(self, work: Any, stage: str) -> Generator[Any, Any, Any]:
        waits: Any = None
        thrown: BaseException | None = None
        while True:
            on = self.on
            if on:
                self.enter(stage)
            try:
                waits = work.send(None) if thrown is None else work.throw(thrown)
            except StopIteration as end:
                return end.value
            finally:
                if on:
                    self.leave()
            try:
                yield waits
                thrown = None
            except BaseException as error:  # noqa: BLE001 - the coroutine's own, not ours
                thrown = error


def measure(stages: Sequence[Stage], to: Path) -> None:
    clocks = Clocks()
    for owner, name, stage in stages:
        setattr(owner, name, clocks.timed(getattr(owner, name), stage))
    written = 0

    def tell(_number: int, _frame: object) -> None:
        nonlocal written
        written += 1
        sums = {stage: nanoseconds / 1e9 for stage, nanoseconds in clocks.sums.items()}
        draft = to.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(Spent(time.thread_time(), sums, written)))
        draft.replace(to)

    def turn(_number: int, _frame: object) -> None:
        clocks.on = not clocks.on

    signal.signal(signal.SIGUSR1, tell)
    signal.signal(signal.SIGUSR2, turn)


class _Threaded:
    """A table's engine on a thread and an event loop of its own."""

    async def launch(
        self, control: socket.socket, batches: socket.socket, inbox: Arena, outbox: Arena
    ) -> EngineProcess:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        theirs = TableEngine().launch(control, batches, inbox, outbox)
        life = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(theirs, loop))
        return _Handle(life, loop)


class _Handle:
    """As `services.worker.launch.EngineProcess`."""

    def __init__(self, life: EngineProcess, loop: asyncio.AbstractEventLoop) -> None:
        self.pid = os.getpid()
        self._life = life
        self._loop = loop

    async def wait(self) -> int:
        return await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(self._life.wait(), self._loop)
        )

    def kill(self) -> None:
        self._loop.call_soon_threadsafe(self._life.kill)

    def hush(self) -> None:
        """It prints nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measured", description=__doc__)
    parser.add_argument("service", choices=["gateway", "worker"])
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    if args.service == "gateway":
        settings = load_or_exit(GatewayConfig, "GATEWAY")
        configure("gateway", settings.log_format, settings.log_level)
        measure((*_COMMON, *_GATEWAY), args.to)
        run_service(lambda stop: gateway.run(settings, stop), "gateway")
        return
    config = load_or_exit(WorkerConfig, "WORKER")
    configure("worker", config.log_format, config.log_level)
    hide_from_engines()
    measure((*_COMMON, *_WORKER), args.to)
    run_service(lambda stop: worker.run(config, stop, launch=_Threaded().launch), "worker")


if __name__ == "__main__":
    main()
