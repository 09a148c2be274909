"""Blocking work in a thread that holds nothing up when the process ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

_T = TypeVar("_T")


async def in_thread(work: Callable[[], _T], name: str) -> _T:
    """As `asyncio.to_thread`, whose threads cannot be left behind: event loop and interpreter
    wait for them at the end, for a download of gigabytes too. Cancelled, it returns at once,
    and the work goes on until the process ends: only for what may be cut off anywhere."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def finish(tell: Callable[[], None]) -> None:
        if not done.done():  # else nobody waits any more
            tell()

    def run() -> None:
        tell: Callable[[], None]
        try:
            tell = partial(done.set_result, work())
        except Exception as error:  # noqa: BLE001 - it is raised where it is awaited
            tell = partial(done.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, tell)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await done
