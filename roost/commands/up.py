"""`roost up`: a stack in the foreground, for one's own models."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from pathlib import Path

from roost.local import MissingService, find_binaries
from roost.stack.port import Stack, StackConfig, StackFailed
from shared import logs
from shared.units import parse_bytes


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
        "--placer-port", type=int, help="port of the placer's own HTTP (default: --port + 1)"
    )
    parser.add_argument("--workers", type=_count, default=1, metavar="N", help="default 1")
    parser.add_argument(
        "--budget", type=parse_bytes, metavar="SIZE",
        help="device memory of each worker, e.g. 4GiB (default: what the device has)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--threads", type=_count, default=1, help="threads per engine (default 1)")
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
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
        placer_port=arguments.placer_port or (arguments.port + 1 if arguments.port else 0),
        workers=arguments.workers,
        budget_bytes=arguments.budget,
        device=arguments.device,
        threads=arguments.threads,
        settings=dict(arguments.set),
    )
    try:
        asyncio.run(_keep_up(make_stack(config, embedded=arguments.embedded)))
    except StackFailed as error:
        print(f"roost: {error}", file=sys.stderr)
        return 1
    return 0


def make_stack(config: StackConfig, *, embedded: bool) -> Stack:
    """The stack of the wished kind, not started. Imports what only that kind needs."""
    if embedded:
        from roost.stack.embedded import EmbeddedStack

        return EmbeddedStack(config)
    from roost.stack.processes import ProcessStack

    return ProcessStack(config)


async def _keep_up(stack: Stack) -> None:
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
        watching = asyncio.create_task(stack.watch())
        await asyncio.wait({watching, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            await watching
        watching.cancel()
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
    if not 1 <= value <= 64:
        raise ValueError
    return value
