"""`roost scale`: starts workers elsewhere as the placer wants them, and has them let go."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal

from roost.calls.sending import authorization
from roost.stack.scaler import CommandRunner, ComposeRunner, Limits, Runner, Scaler
from roost.trust import add_ca_file, verify
from shared import logs


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], url: str) -> None:
    parser = commands.add_parser(
        "scale",
        help="start and let go workers as the placer wants them",
        description="Runs until Ctrl-C. Starts workers by docker compose, or by a command of your "
        "own, whenever the placer wants more; when it wants fewer, lets one finish and end by "
        "itself. Never stops a worker.",
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--compose", action="append", metavar="FILE",
        help="workers are containers of a service in this docker compose file; may be repeated",
    )  # fmt: skip
    how.add_argument(
        "--exec", metavar="COMMAND", dest="command",
        help="starts workers until there are {count}, and ends none; run without a shell",
    )  # fmt: skip
    parser.add_argument(
        "--service", default="worker", help="compose service of the workers (default worker)"
    )
    parser.add_argument("--min-workers", type=int, default=1, metavar="K", help="default 1")
    parser.add_argument("--max-workers", type=int, required=True, metavar="M")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="default 1 s")
    parser.add_argument(
        "--placer-url", default=url, help=f"the placer (default {url}, or $ROOST_PLACER_URL)"
    )
    add_ca_file(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.min_workers <= arguments.max_workers or not arguments.max_workers:
        arguments.usage_error("0 <= --min-workers <= --max-workers is expected")
    if arguments.interval <= 0:
        arguments.usage_error("--interval must be above 0")
    logs.configure("roost", "auto", "info")
    scaler = Scaler(
        arguments.placer_url,
        _runner(arguments),
        Limits(arguments.min_workers, arguments.max_workers),
        interval_s=arguments.interval,
        verify=verify(arguments.placer_url),
        headers=authorization(),
    )
    asyncio.run(_until_asked(scaler))
    return 0


def _runner(arguments: argparse.Namespace) -> Runner:
    if arguments.compose:
        options = [option for file in arguments.compose for option in ("--file", file)]
        return ComposeRunner(tuple(options), arguments.service)
    command = tuple(shlex.split(arguments.command))
    if not any("{count}" in part for part in command):
        arguments.usage_error("--exec must say where the number of workers goes: {count}")
    return CommandRunner(command)


async def _until_asked(scaler: Scaler) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    waits = [asyncio.create_task(scaler.run()), asyncio.create_task(stop.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    results = await asyncio.gather(*waits, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
