"""`python -m benchmarks.worker`: the worker, whose replies say who answered, and which keeps a
diary. With `--table` its device is a table of times (benchmarks/table.py).

The diary tells, at the machine's wall clock, when the worker told what it saw, learned what it is
to do, and began to consume: from it a benchmark takes apart where the time went.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, Literal

import msgspec

from benchmarks.table import TableEngine
from services.worker.app import run
from services.worker.config import WorkerConfig
from services.worker.launch import hide_from_engines
from shared.broker.amqp import AmqpBroker
from shared.broker.consumer import AmqpConsumer
from shared.broker.port import Message, OnDelivery
from shared.config import load_or_exit
from shared.control import Assignment, Report
from shared.logs import configure
from shared.names import HEADER_CODE
from shared.store.redis import RedisStore
from shared.supervise import run_service

HEADER_WORKER: Final = "x-benchmark-worker"
"""In a reply over AMQP: the worker that answered."""


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the diary."""

    at: float
    """Unix time."""
    what: Literal["reported", "assigned", "consuming"]
    worker: str
    arrived: dict[str, int] = {}
    """`reported`: requests so far, of the models whose count has changed."""
    bound: int = -1
    """`reported`: models whose queues it consumes."""
    queue: str = ""
    """`consuming`."""
    models: tuple[str, ...] = ()
    """`assigned`: all that are wanted bound."""


class Diary:
    def __init__(self, file: IO[bytes], worker: str) -> None:
        self._file = file
        self._worker = worker
        self._arrived: dict[str, int] = {}
        self._bound = 0

    def reported(self, report: Report) -> None:
        """The store has it."""
        news: dict[str, int] = {
            model.model: model.arrived
            for model in report.models
            if self._arrived.get(model.model, 0) != model.arrived
        }
        bound = sum(model.bound for model in report.models)
        if news or bound != self._bound:
            self._arrived |= news
            self._bound = bound
            self._write(Entry(time.time(), "reported", self._worker, arrived=news, bound=bound))

    def assigned(self, assignment: Assignment) -> None:
        models = tuple(each.model for each in assignment.models)
        self._write(Entry(time.time(), "assigned", self._worker, models=models))

    def consumes(self, queue: str) -> None:
        self._write(Entry(time.time(), "consuming", self._worker, queue=queue))

    def _write(self, entry: Entry) -> None:
        self._file.write(msgspec.json.encode(entry) + b"\n")
        self._file.flush()


def read_diary(path: Path) -> list[Entry]:
    """All that was written so far."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [msgspec.json.decode(line, type=Entry) for line in lines]


class _Broker(AmqpBroker):
    """As ever, but replies bear the worker's name."""

    def __init__(self, url: str, worker: str, diary: Diary) -> None:
        super().__init__(url, f"worker-{worker}")
        self._worker = worker
        self._diary = diary

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        message: Message,
        *,
        mandatory: bool = True,
        timeout_s: float = 5.0,
    ) -> None:
        if HEADER_CODE in message.headers:
            message.headers[HEADER_WORKER] = self._worker
        await super().publish(
            exchange, routing_key, message, mandatory=mandatory, timeout_s=timeout_s
        )

    async def consume(
        self,
        queue: str,
        on_delivery: OnDelivery,
        *,
        prefetch: int,
        on_gone: Callable[[], None] | None = None,
        priority: int = 0,
    ) -> AmqpConsumer:
        consumer = await super().consume(
            queue, on_delivery, prefetch=prefetch, on_gone=on_gone, priority=priority
        )
        self._diary.consumes(queue)
        return consumer


class _Store(RedisStore):
    def __init__(self, url: str, diary: Diary) -> None:
        super().__init__(url)
        self._diary = diary
        self._generation = 0

    async def put_report(self, report: Report, ttl_s: float) -> None:
        await super().put_report(report, ttl_s)
        self._diary.reported(report)

    async def assignment(self, worker: str) -> Assignment | None:
        found = await super().assignment(worker)
        if found is not None and found.generation != self._generation:
            self._generation = found.generation
            self._diary.assigned(found)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--diary", type=Path, required=True)
    args = parser.parse_args()
    config = load_or_exit(WorkerConfig, "WORKER")
    configure("worker", config.log_format, config.log_level)
    hide_from_engines()
    with args.diary.open("ab") as file:
        diary = Diary(file, config.worker_id)
        run_service(
            lambda stop: run(
                config,
                stop,
                broker=_Broker(config.amqp_url, config.worker_id, diary),
                store=_Store(config.redis_url, diary),
                launch=TableEngine().launch if args.table else None,
            ),
            "worker",
        )


if __name__ == "__main__":
    main()
