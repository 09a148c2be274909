"""What is kept of each model between two looks, as columns that grow."""

from __future__ import annotations

import numpy as np

from services.placer.core.columns import Bools, Floats, Ints
from shared.names import ModelId

_FLOATS = (
    "fast", "slow", "rate", "sure", "last_active", "seconds", "load_seconds", "_seconds_sum",
)  # fmt: skip
_INTS = ("held", "_measured")


class Tracked:
    """Rows by model. A row stays a model's until the model is dropped; it is then another's."""

    fast: Floats
    """Requests per second: over about a second,"""
    slow: Floats
    """over about a minute,"""
    rate: Floats
    """and as counted last, by all workers together."""
    sure: Floats
    """What of that is no chance, however few they were."""
    last_active: Floats
    held: Ints
    seconds: Floats
    """Per request: the mean of all workers that measured it; the last known when none does."""
    load_seconds: Floats
    """The longest that was told."""
    _seconds_sum: Floats
    _measured: Ints

    def __init__(self) -> None:
        self.row: dict[ModelId, int] = {}
        self.ids: list[ModelId | None] = []
        self.dropped = 0
        """Models that were dropped so far: rows that somebody keeps are good until then."""
        self._free: list[int] = []
        for name in _FLOATS:
            setattr(self, name, np.zeros(0))
        for name in _INTS:
            setattr(self, name, np.zeros(0, np.int64))

    def __repr__(self) -> str:
        return f"<Tracked {len(self.row)} models>"

    def take(self, model: ModelId, last_active: float) -> int:
        """The model's row; a new one, last asked then, when it has none."""
        row = self.row.get(model)
        if row is not None:
            return row
        if not self._free:
            self._grow()
        row = self.row[model] = self._free.pop()
        self.ids[row] = model
        for name in (*_FLOATS, *_INTS):
            getattr(self, name)[row] = 0
        self.last_active[row] = last_active
        return row

    def drop(self, model: ModelId) -> None:
        """Forgets the model."""
        row = self.row.pop(model, None)
        if row is not None:
            self.dropped += 1
            self.ids[row] = None
            for name in (*_FLOATS, *_INTS):
                getattr(self, name)[row] = 0
            self._free.append(row)

    def hold(self, rows: Ints, more: Floats) -> None:
        """Workers hold so many more (below 0: fewer) of these, a row for each of them. What was
        dropped meanwhile counts from 0."""
        np.add.at(self.held, rows, more.astype(np.int64))
        np.maximum(self.held, 0, out=self.held)

    def time(self, row: int, before: float, seconds: float) -> None:
        """A worker takes so long for a request, and not what it took before; 0: it does not say."""
        if before > 0 and self._measured[row] > 0:
            self._measured[row] -= 1
            # Sums of floats that come and go do not end at exactly 0.
            left = self._seconds_sum[row] - before
            self._seconds_sum[row] = left if self._measured[row] else 0.0
        if seconds > 0:
            self._seconds_sum[row] += seconds
            self._measured[row] += 1
        if self._measured[row] > 0:
            self.seconds[row] = self._seconds_sum[row] / self._measured[row]

    def times(self, rows: Ints, before: Floats, seconds: Floats) -> None:
        """`time` for each of these, of which all had said and say something."""
        alone = self._measured[rows] == 1
        self._seconds_sum[rows[alone]] = seconds[alone]
        shared = rows[~alone]
        change = np.column_stack((-before[~alone], seconds[~alone]))
        np.add.at(self._seconds_sum, np.repeat(shared, 2), change.ravel())
        self.seconds[rows] = self._seconds_sum[rows] / self._measured[rows]

    def is_timed(self, rows: Ints) -> Bools:
        """Whether any worker says how long each takes."""
        timed: Bools = self._measured[rows] > 0
        return timed

    def _grow(self) -> None:
        size = len(self.ids)
        more = max(size, 64)
        self.ids += [None] * more
        self._free += range(size + more - 1, size - 1, -1)
        for name in (*_FLOATS, *_INTS):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros(more, column.dtype)]))
