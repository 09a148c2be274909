"""One placer decides, the others stand by.

The holder renews; one that cannot for half the lease's time, by its own monotonic clock, steps
down before anybody else can have acquired it. What it wrote before carries its fence, so a
placer that was suspended meanwhile overwrites nothing newer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from shared.store.port import TOPIC_LEASE, Store, StoreUnavailable

log = structlog.get_logger(__name__)


class Lease:
    """`held` and `lost` are events, exactly one of which is set."""

    def __init__(
        self,
        store: Store,
        holder: str,
        *,
        ttl_s: float,
        renew_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.holder = holder
        self.fence = 0
        self.held = asyncio.Event()
        self.lost = asyncio.Event()
        self.lost.set()
        self.known = False
        """Whether the store has answered lately, with a yes or a no."""
        self._store = store
        self._ttl_s = ttl_s
        self._renew_s = renew_s
        self._clock = clock
        self._renewed = 0.0
        self._released = asyncio.Event()
        """Somebody let the lease go."""

    @property
    def valid(self) -> bool:
        """Whether this placer may write now."""
        return self.held.is_set() and self._clock() - self._renewed < self._ttl_s / 2

    async def keep(self) -> None:
        """For ever: acquires, renews, steps down."""
        while True:
            self._released.clear()
            await self.renew()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._renew_s):
                    await self._released.wait()

    async def listen(self) -> None:
        """For ever: who stands by leads as soon as the lease is let go."""
        async for _ in self._store.hints(TOPIC_LEASE):
            if not self.held.is_set():
                self._released.set()

    async def renew(self) -> None:
        # Counted from before the question: the store's clock runs from somewhere after it.
        began = self._clock()
        try:
            async with asyncio.timeout(self._ttl_s / 4):
                fence = await self._store.acquire_lease(self.holder, self._ttl_s)
        except (StoreUnavailable, TimeoutError) as error:
            self.known = False
            if self.held.is_set() and self._clock() - self._renewed >= self._ttl_s / 2:
                self.step_down(f"not renewed in time: {str(error) or 'no answer'}")
            return
        self.known = True
        if fence is None:
            self.step_down("another placer has it")
            return
        if self.held.is_set() and self._clock() - self._renewed >= self._ttl_s / 2:
            # It was not ours for a while (the process was suspended, say): begin afresh.
            self.step_down("renewed too late")
        self._renewed = began
        if fence != self.fence:
            log.info("lease_acquired", holder=self.holder, fence=fence)
        self.fence = fence
        if not self.held.is_set():
            self.lost.clear()
            self.held.set()

    def step_down(self, reason: str) -> None:
        if self.held.is_set():
            log.warning("lease_lost", holder=self.holder, fence=self.fence, reason=reason)
            self.held.clear()
            self.lost.set()

    async def release(self) -> None:
        """Lets the next one in at once. Best effort: it expires anyway."""
        had = self.held.is_set()
        self.step_down("released")
        try:
            async with asyncio.timeout(self._ttl_s / 4):
                await self._store.release_lease(self.holder)
                if had:
                    await self._store.hint(TOPIC_LEASE)
        except (StoreUnavailable, TimeoutError) as error:
            log.info("lease_not_released", reason=str(error) or "no answer")
