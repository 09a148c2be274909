"""What was under way when the connection to the broker was lost: who still waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from shared.supervise import Backoff

T = TypeVar("T")


async def still_awaited(
    doubtful: Sequence[T],
    awaited: Callable[[T], bool],
    ready: Callable[[], bool],
    settle_s: float,
) -> list[T]:
    """Returns those that have no answer `settle_s` after the connection is `ready` again: what did
    arrive before the loss has been answered by then, as a rule. Empty at once where nobody waits
    any more."""
    backoff, back = Backoff(), False
    waiting = [each for each in doubtful if awaited(each)]
    while waiting:
        await asyncio.sleep(settle_s if back else backoff.next())
        waiting = [each for each in waiting if awaited(each)]
        if back and ready():
            break
        back = ready()
    return waiting
