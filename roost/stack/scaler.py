"""Follows the placer's number of workers: starts more at once, and has fewer by asking the placer
to let one go. Nothing here ends a worker: one that is let go ends by itself, with status 0, when
others have taken over what it had. So nothing is dropped, and no wrong one is hit.

The loop looks at what is and does the next step towards what should be; it remembers nothing
that matters, so it may die and start at any time.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import httpx
import msgspec
import structlog

from roost.stack.port import Stack

log = structlog.get_logger(__name__)

_TIMEOUT_S: Final = 10.0


class RunnerFailed(RuntimeError):
    """Workers could not be counted or started; the message says why. It is tried again."""


class Runner(Protocol):
    """Where workers run. An implementation for each place."""

    async def count(self, reporting: int) -> int:
        """Workers that run or are being started, also those that do not report to the placer
        yet, as `reporting` do. Raises `RunnerFailed`."""

    async def start(self, more: int, running: int) -> None:
        """Starts so many more than the `running` ones, none of which may be ended. Need not wait
        for them. Raises `RunnerFailed`."""


class Fleet(msgspec.Struct, frozen=True):
    """What `GET /fleet/workers-wanted` says."""

    workers_wanted: int
    workers: tuple[str, ...]
    """That report and stay."""
    leaving: tuple[str, ...] = ()
    """That were asked to leave, and may yet stay."""
    ending: tuple[str, ...] = ()
    """That were told to end."""
    reasons: tuple[str, ...] = ()


class Limits(msgspec.Struct, frozen=True):
    """Fewest and most workers."""

    low: int
    high: int


class Step(msgspec.Struct, frozen=True):
    """What to do next."""

    keep: tuple[str, ...] = ()
    """Workers that stay after all."""
    start: int = 0
    shrink_to: int | None = None


def next_step(fleet: Fleet, running: int, limits: Limits) -> Step:
    """Up at once, first with those that are about to leave; down by one, and only when all that
    were started are there and nobody is leaving yet."""
    wanted = min(max(fleet.workers_wanted, limits.low), limits.high)
    reporting = len(fleet.workers) + len(fleet.leaving) + len(fleet.ending)
    starting = max(running - reporting, 0)
    staying = len(fleet.workers) + starting
    if wanted > staying:
        keep = fleet.leaving[: wanted - staying]
        return Step(keep, wanted - staying - len(keep))
    if wanted < staying and not starting and not fleet.leaving and not fleet.ending:
        return Step(shrink_to=staying - 1)
    return Step()


class Scaler:
    """One loop between a placer and a runner."""

    def __init__(
        self,
        placer_url: str,
        runner: Runner,
        limits: Limits,
        *,
        interval_s: float = 0.5,
        verify: ssl.SSLContext | bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`verify` is httpx's; `headers` may show an API key."""
        self._headers = dict(headers or {})
        self._runner = runner
        self._limits = limits
        self._interval_s = interval_s
        self._verify = verify
        self._url = placer_url.rstrip("/")
        self._trouble = ""

    async def run(self) -> None:
        """For ever. A placer that does not answer or does not know yet changes nothing."""
        async with httpx.AsyncClient(
            base_url=self._url,
            timeout=_TIMEOUT_S,
            trust_env=False,
            verify=self._verify,
            headers=self._headers,
        ) as placer:
            while True:
                try:
                    await self.look(placer)
                except (httpx.HTTPError, RunnerFailed, msgspec.MsgspecError) as error:
                    self._tell(str(error) or type(error).__name__)
                else:
                    self._tell("")
                await asyncio.sleep(self._interval_s)

    async def look(self, placer: httpx.AsyncClient) -> Step:
        """One look and its step, which is returned. Raises what `run` catches."""
        answer = await placer.get("/fleet/workers-wanted")
        answer.raise_for_status()
        fleet = msgspec.json.decode(answer.content, type=Fleet)
        reporting = len(fleet.workers) + len(fleet.leaving) + len(fleet.ending)
        running = max(await self._runner.count(reporting), reporting)
        step = next_step(fleet, running, self._limits)
        for worker in step.keep:
            log.info("worker_kept", worker=worker, reasons=fleet.reasons)
            (await placer.delete(f"/fleet/workers/{worker}/drain")).raise_for_status()
        if step.start:
            log.info("workers_started", workers=step.start, reasons=fleet.reasons)
            await self._runner.start(step.start, running)
        if step.shrink_to is not None:
            asked = await placer.post("/fleet/shrink", params={"to": step.shrink_to})
            asked.raise_for_status()
            chosen = asked.json()
            log.info("worker_let_go", worker=chosen["worker"], why=chosen["why"])
        return step

    def _tell(self, trouble: str) -> None:
        """Each trouble once, not twice a second."""
        if trouble and trouble != self._trouble:
            log.warning("not_scaled", error=trouble)
        self._trouble = trouble


class StackRunner:
    """Workers of a stack that runs here."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    async def count(self, reporting: int) -> int:
        del reporting  # the stack knows
        return len(self._stack.workers())

    async def start(self, more: int, running: int) -> None:
        del running
        for _ in range(more):
            self._stack.spawn_worker()


class CommandRunner:
    """Starts workers by a command that is told how many there should be, e.g. of a cluster
    manager. It must not end any."""

    def __init__(
        self,
        command: tuple[str, ...],
        *,
        start_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`{count}` in the command is the number. What it started and does not report within
        `start_s` seconds is taken for failed, and started again."""
        self._command = command
        self._start_s = start_s
        self._clock = clock
        self._asked = 0
        self._until = 0.0

    async def count(self, reporting: int) -> int:
        if reporting >= self._asked or self._clock() >= self._until:
            self._asked = 0
        return max(reporting, self._asked)

    async def start(self, more: int, running: int) -> None:
        total = running + more
        await output_of(*(part.replace("{count}", str(total)) for part in self._command))
        self._asked, self._until = total, self._clock() + self._start_s


class ComposeRunner:
    """Workers as containers of one docker compose service, whose restart policy must be
    `on-failure`: else a worker that was let go would be started again."""

    def __init__(self, options: tuple[str, ...], service: str = "worker") -> None:
        """`options` go before compose's own command, e.g. `-f FILE`."""
        self._compose = ("docker", "compose", *options)
        self._service = service

    async def count(self, reporting: int) -> int:
        del reporting  # compose knows
        alive = [f"--status={status}" for status in ("created", "restarting", "running")]
        listed = await output_of(*self._compose, "ps", "--quiet", *alive, self._service)
        return len(listed.split())

    async def start(self, more: int, running: int) -> None:
        # Containers that have ended count for `--scale`, and would be started again.
        await output_of(*self._compose, "rm", "--force", self._service)
        total = max(running, await self.count(0)) + more
        scale = f"--scale={self._service}={total}"
        await output_of(
            *self._compose, "up", "--detach", "--no-deps", "--no-recreate", scale, self._service
        )


async def output_of(*command: str, limit_s: float = 300.0) -> str:
    """Runs a command and returns what it printed. Raises `RunnerFailed`."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise RunnerFailed(f"{command[0]}: {error}") from error
    try:
        async with asyncio.timeout(limit_s):
            told, errors = await process.communicate()
    except TimeoutError as error:
        raise RunnerFailed(f"{' '.join(command)} did not end within {limit_s:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        said = errors.decode(errors="replace").strip()[-500:]
        raise RunnerFailed(f"{' '.join(command)} ended with {process.returncode}: {said}")
    return told.decode(errors="replace")
