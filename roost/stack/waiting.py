"""Waiting for a stack to come up, by asking it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx

from roost.calls.sending import authorization
from roost.stack.port import StackFailed

START_S = 90.0
"""Importing torch takes 3 to 7 seconds, RabbitMQ 6 to 20; a busy machine several times that."""


async def wait_for_url(
    url: str, what: str, alive: Callable[[], None], limit_s: float = START_S
) -> None:
    """Returns once `url` answers 200. `alive` raises `StackFailed` when waiting is in vain."""
    deadline = time.monotonic() + limit_s
    async with _asking(2.0) as client:
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
    placer_url: str,
    workers: set[str],
    alive: Callable[[], None],
    limit_s: float = START_S,
    *,
    api_key: str = "",
) -> None:
    """Returns once the placer sees all these workers with a running engine."""
    deadline = time.monotonic() + limit_s
    while True:
        alive()
        found = (await fleet(placer_url, api_key))["workers"]
        seen = {worker["worker"] for worker in found if worker["engine_up"]}
        if workers <= seen:
            return
        if time.monotonic() > deadline:
            missing = ", ".join(sorted(workers - seen))
            raise StackFailed(f"no report from {missing} within {limit_s:.0f} s")
        await asyncio.sleep(0.1)


async def fleet(placer_url: str, api_key: str = "") -> dict[str, Any]:
    """The placer's view of the fleet; an empty one while it cannot be asked."""
    try:
        async with _asking(5.0) as client:
            answer = await client.get(f"{placer_url}/fleet", headers=authorization(api_key))
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found
    except (httpx.HTTPError, ValueError):
        return {"workers": []}


def _asking(timeout_s: float) -> httpx.AsyncClient:
    # Certificates are not verified: these are our own processes on the loopback, and theirs is
    # made out to the name that others know.
    return httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=False)  # noqa: S501
