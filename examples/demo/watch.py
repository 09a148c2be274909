"""Looks at the placer's fleet several times a second and keeps what it saw."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec


class Seat(msgspec.Struct, frozen=True):
    """One model on one worker."""

    model: str
    worker: str
    tier: str
    bound: bool
    bytes: int


class Sight(msgspec.Struct, frozen=True):
    """The fleet at one moment (`time.monotonic()` seconds)."""

    at: float
    seats: tuple[Seat, ...]
    used_bytes: dict[str, int]
    measured_bytes: dict[str, int]

    def bound(self) -> dict[str, set[str]]:
        """Workers by model, bindings only."""
        found: dict[str, set[str]] = {}
        for seat in self.seats:
            if seat.bound:
                found.setdefault(seat.model, set()).add(seat.worker)
        return found

    def resident(self, worker: str) -> set[str]:
        return {s.model for s in self.seats if s.worker == worker and s.tier == "device"}


class Watcher:
    """Samples while it runs; `until` waits for something to be seen."""

    def __init__(self, placer_url: str, interval_s: float = 0.1) -> None:
        self._client = httpx.AsyncClient(base_url=placer_url, timeout=10.0, trust_env=False)
        self._interval_s = interval_s
        self.sights: list[Sight] = []
        self._seen = asyncio.Condition()

    async def run(self) -> None:
        while True:
            try:
                answer = await self._client.get("/fleet")
                answer.raise_for_status()
            except httpx.HTTPError:
                await asyncio.sleep(self._interval_s)
                continue
            async with self._seen:
                self.sights.append(_sight(answer.json()))
                self._seen.notify_all()
            await asyncio.sleep(self._interval_s)

    async def until(self, condition: Callable[[Sight], bool], limit_s: float) -> Sight | None:
        """The first sight from now on for which `condition(sight)` holds; None when the time
        is over before."""
        try:
            async with asyncio.timeout(limit_s), self._seen:
                seen = len(self.sights)
                while True:
                    await self._seen.wait()
                    for sight in self.sights[seen:]:
                        if condition(sight):
                            return sight
                    seen = len(self.sights)
        except TimeoutError:
            return None

    async def close(self) -> None:
        await self._client.aclose()


def _sight(fleet: dict[str, Any]) -> Sight:
    return Sight(
        at=time.monotonic(),
        seats=tuple(
            Seat(
                model=str(m["model"]).partition("/")[0],
                worker=str(w["worker"]),
                tier=str(m["tier"]),
                bound=bool(m["bound"]),
                bytes=int(m["bytes"]),
            )
            for w in fleet["workers"]
            for m in w["models"]
        ),
        used_bytes={w["worker"]: int(w["used_bytes"]) for w in fleet["workers"]},
        measured_bytes={w["worker"]: int(w["measured_bytes"]) for w in fleet["workers"]},
    )
