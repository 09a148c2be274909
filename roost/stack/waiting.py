"""Waiting for a stack to come up, by asking it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx

from roost.stack.port import StackFailed

START_S = 90.0
"""Importing torch takes 3 to 7 seconds, RabbitMQ 6 to 20; a busy machine several times that."""


async def wait_for_url(
    url: str, what: str, alive: Callable[[], None], limit_s: float = START_S
) -> None:
    """Returns once `url` answers 200. `alive` raises `StackFailed` when waiting is in vain."""
    deadline = time.monotonic() + limit_s
    async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
        while True:
            alive()
            try:
                if (await client.get(url)).status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise StackFailed(f"{what} did not get ready within {limit_s:.0f} s")
            await asyncio.sleep(0.1)


async def wait_for_workers(
    placer_url: str, workers: set[str], alive: Callable[[], None], limit_s: float = START_S
) -> None:
    """Returns once the placer sees all these workers with a running engine."""
    deadline = time.monotonic() + limit_s
    while True:
        alive()
        seen = {w["worker"] for w in (await fleet(placer_url))["workers"] if w["engine_up"]}
        if workers <= seen:
            return
        if time.monotonic() > deadline:
            missing = ", ".join(sorted(workers - seen))
            raise StackFailed(f"no report from {missing} within {limit_s:.0f} s")
        await asyncio.sleep(0.1)


async def fleet(placer_url: str) -> dict[str, Any]:
    """The placer's view of the fleet; an empty one while it cannot be asked."""
    try:
        async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
            answer = await client.get(f"{placer_url}/fleet")
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found
    except (httpx.HTTPError, ValueError):
        return {"workers": []}
