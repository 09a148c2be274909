"""`roost up`: a stack in the foreground, for one's own models."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from pathlib import Path

from roost.calls.sending import authorization
from roost.local import MissingService, find_binaries
from roost.stack.port import Stack, StackConfig, StackFailed
from roost.stack.scaler import Limits, Scaler, StackRunner
from shared import logs
from shared.units import parse_bytes

_MOST_WORKERS = 64


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "up",
        help="run gateway, placer and workers in the foreground",
        description="Runs a stack on this machine until Ctrl-C: private RabbitMQ and Redis, "
        "gateway, placer, workers. Prints 'ready: URL' when it can answer.",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="HTTP port (default 8000; 0: a free one)"
    )
    parser.add_argument(
        "--grpc-port", type=int,
        help="gRPC port (default: --port + 1, Triton's 8001; 0: a free one, -1: none)",
    )  # fmt: skip
    parser.add_argument(
        "--placer-port", type=int, help="port of the placer's own HTTP (default: --port + 3)"
    )
    parser.add_argument(
        "--workers", type=_count, metavar="N", help="default 1, or --min-workers; to begin with"
    )
    parser.add_argument(
        "--max-workers", type=_count, metavar="M",
        help="follow what is asked: up to so many, and as few as --min-workers (default: N always)",
    )  # fmt: skip
    parser.add_argument(
        "--min-workers",
        type=_count,
        metavar="K",
        help="with --max-workers; default 1; 0 is allowed",
    )
    parser.add_argument(
        "--budget", type=parse_bytes, metavar="SIZE",
        help="device memory of each worker, e.g. 4GiB (default: what the device has)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument(
        "--threads", type=_threads, default=1, help="threads per engine (default 1)"
    )
    parser.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE",
        help="any ROOST_… setting of a service, e.g. ROOST_WORKER_HOST_BYTES=8GiB; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, default=Path(".roost"), metavar="DIR",
        help="models, broker files and logs (default .roost)",
    )  # fmt: skip
    parser.add_argument(
        "--embedded", action="store_true",
        help="one process over in-memory twins of RabbitMQ and Redis, where those cannot be had",
    )  # fmt: skip
    parser.set_defaults(run=run, usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    limits, workers = _fleet(arguments)
    if "ROOST_TLS_CLIENT_CA_FILE" in dict(arguments.set):
        arguments.usage_error("ROOST_TLS_CLIENT_CA_FILE: `roost up` has no certificate to ask with")
    if not arguments.embedded:
        try:
            find_binaries()
        except MissingService as error:
            print(f"roost: {error}", file=sys.stderr)
            return 1
    logs.configure("roost", "console", "warning")
    config = StackConfig(
        data_dir=arguments.data.resolve(),
        port=arguments.port,
        grpc_port=_beside(arguments.port, 1, arguments.grpc_port),
        placer_port=_beside(arguments.port, 3, arguments.placer_port),
        workers=workers,
        budget_bytes=arguments.budget,
        device=arguments.device,
        threads=arguments.threads,
        settings={"ROOST_PLACER_MIN_WORKERS": str(limits.low), **dict(arguments.set)},
    )
    try:
        asyncio.run(_keep_up(make_stack(config, embedded=arguments.embedded), limits))
    except StackFailed as error:
        print(f"roost: {error}", file=sys.stderr)
        return 1
    return 0


def _beside(port: int, distance: int, wished: int | None) -> int:
    """The wished port, else one at a distance from the gateway's; free ones keep free company."""
    if wished is not None:
        return wished
    return port + distance if port else 0


def make_stack(config: StackConfig, *, embedded: bool) -> Stack:
    """The stack of the wished kind, not started. Imports what only that kind needs."""
    if embedded:
        from roost.stack.embedded import EmbeddedStack

        return EmbeddedStack(config)
    from roost.stack.processes import ProcessStack

    return ProcessStack(config)


def _fleet(arguments: argparse.Namespace) -> tuple[Limits, int]:
    """How many workers there may be, and how many to begin with."""
    fewest, most, workers = arguments.min_workers, arguments.max_workers, arguments.workers
    if most is None:
        if fewest is not None:
            arguments.usage_error("--min-workers is for --max-workers")
        workers = 1 if workers is None else workers
        if not workers:
            arguments.usage_error("--workers 0 is for --max-workers")
        return Limits(workers, workers), workers
    low = min(1, most) if fewest is None else fewest
    workers = low if workers is None else workers
    if not low <= workers <= most or not most:
        arguments.usage_error("--min-workers <= --workers <= --max-workers is expected")
    return Limits(low, most), workers


async def _follow(stack: Stack, limits: Limits) -> None:
    """Keeps the stack up, with as many workers as the placer wants, where that may change."""
    async with asyncio.TaskGroup() as group:
        group.create_task(stack.watch(), name="watch")
        if limits.low < limits.high:
            headers = authorization(stack.placer_key)
            runner = StackRunner(stack)
            scaler = Scaler(stack.placer_url, runner, limits, verify=False, headers=headers)
            group.create_task(scaler.run(), name="scaler")


async def _keep_up(stack: Stack, limits: Limits) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    stopped = asyncio.create_task(stop.wait())
    try:
        starting = asyncio.create_task(stack.start())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, StackFailed):
                await starting
            return
        await starting
        for name, url in stack.endpoints().items():
            print(f"{name}: {url}")
        print(f"ready: {stack.gateway_url}", flush=True)
        following = asyncio.create_task(_follow(stack, limits))
        await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            try:
                await following
            except* StackFailed as group:
                raise group.exceptions[0] from None
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following  # or it would start a worker that nobody ends
    finally:
        stopped.cancel()
        print("stopping …", file=sys.stderr, flush=True)
        await stack.close()


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("ROOST_"):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROOST_NAME=VALUE")
    return name, value


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= _MOST_WORKERS:
        raise ValueError
    return value


def _threads(text: str) -> int:
    if not _count(text):
        raise ValueError
    return int(text)
