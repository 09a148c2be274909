"""Threads that hold nothing up."""

from __future__ import annotations

import asyncio
import threading

import pytest

from services.worker.threads import in_thread


async def test_results_and_errors_come_back():
    """As from any call."""
    assert await in_thread(lambda: 42, "t") == 42
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0, "t")


def test_work_that_never_ends_is_left_behind():
    """Neither the one who cancels nor the end of the event loop waits for it; what it says
    afterwards nobody hears."""
    go, done = threading.Event(), threading.Event()

    def work() -> None:
        go.wait()
        done.set()

    async def main() -> None:
        task = asyncio.create_task(in_thread(work, "for ever"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())
    (left,) = [each for each in threading.enumerate() if each.name == "for ever"]
    assert left.daemon
    go.set()
    left.join(5)
    assert done.is_set()
