"""Notices that a client hung up while its request is under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from services.gateway.body import ClientGone, Receive

PATIENCE_S: Final = 0.1
"""Most answers come sooner; only the others pay for a task that watches the connection."""


@contextlib.asynccontextmanager
async def watching_for_hangup(receive: Receive) -> AsyncIterator[None]:
    """Interrupts the body of this block with `ClientGone` when the client disconnects.

    The request must have been read to its end. A cancellation from elsewhere stays one.
    """
    waiting = asyncio.current_task()
    assert waiting is not None, "runs inside a task"
    loop = asyncio.get_running_loop()
    watcher: asyncio.Task[None] | None = None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        waiting.cancel()

    def begin() -> None:
        nonlocal watcher
        watcher = loop.create_task(watch(), name="hangup-watch")

    timer = loop.call_later(PATIENCE_S, begin)
    try:
        yield
    except asyncio.CancelledError:
        if gone and waiting.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
