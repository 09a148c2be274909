"""Whether the engine's memory is being moved by others than the batches."""

from __future__ import annotations

import threading


class Unrest:
    """Loads and evictions under way, in any thread: a peak measured meanwhile tells nothing.
    To be entered by whoever loads or evicts, as often and in whatever order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._begun = 0

    def __enter__(self) -> None:
        with self._lock:
            self._under_way += 1
            self._begun += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._under_way -= 1

    def quiet(self) -> int | None:
        """The same number at two times when nothing moved from the one to the other; None while
        something does."""
        with self._lock:
            return None if self._under_way else self._begun
