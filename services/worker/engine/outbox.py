"""Room for outputs: one block of the outbox per batch, from its run until its `Release`."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from services.worker.arena import Allocator, Arena
from services.worker.engine.failures import Failed


class Outbox:
    """Reserved on the dispatch thread; a batch that fails later is released where it does."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._allocator = Allocator(arena.capacity)
        self._offsets: dict[int, int] = {}
        self._lock = threading.Lock()

    def reserve(self, batch: int, nbytes: int) -> int | None:
        """The offset of the batch's block, or None when there is no room before a `release`.

        Raises `Failed` (`too_large`) when even the empty outbox could not hold it.
        """
        if nbytes > self._allocator.capacity:
            raise Failed(
                "too_large",
                f"the outputs take {nbytes:,} bytes, the worker's outbox holds "
                f"{self._allocator.capacity:,}",
            )
        with self._lock:
            offset = self._allocator.alloc(nbytes)
            if offset is not None:
                self._offsets[batch] = offset
        return offset

    def release(self, batches: Iterable[int]) -> None:
        """Gives the blocks back. A batch without a block is passed over."""
        with self._lock:
            for batch in batches:
                offset = self._offsets.pop(batch, None)
                if offset is not None:
                    self._allocator.free(offset)
