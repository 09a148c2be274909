"""What one model was measured to take: seconds by batch size, bytes by batch size."""

from __future__ import annotations

from bisect import bisect_left

from shared.models import Footprint, Profile

_WEIGHT = 0.2
"""Of a new measurement in the moving average: five or so forget a slow start."""
_SIZES = 64
"""Batch sizes remembered; enough to interpolate between, whatever `max_batch_size` is."""
_DRIFT = 0.10
"""A profile that is further off than this is written again."""


class BatchTimes:
    """Moving averages of the seconds that a batch takes, by its rows."""

    def __init__(self, seconds: dict[int, float] | None = None) -> None:
        self._seconds = {rows: s for rows, s in (seconds or {}).items() if rows > 0 and s > 0}
        self._order = sorted(self._seconds)
        self._per_item = 0.0

    def __repr__(self) -> str:
        return f"BatchTimes({ {rows: round(self._seconds[rows], 6) for rows in self._order} })"

    def measured(self, rows: int, seconds: float, items: int = 1) -> None:
        """A batch of `rows` rows, of `items` requests, took `seconds`."""
        if rows < 1 or seconds <= 0:
            return
        self._seconds[rows] = _ewma(self._seconds.get(rows), seconds)
        self._per_item = _ewma(self._per_item or None, seconds / max(items, 1))
        if len(self._seconds) > _SIZES:
            # Keep the ends, drop every second size between: interpolation fills the gaps.
            kept = self._order[:1] + self._order[2:-1:2] + self._order[-1:]
            self._seconds = {size: self._seconds[size] for size in {*kept, rows}}
        self._order = sorted(self._seconds)

    def estimate(self, rows: int) -> float:
        """Seconds for a batch of `rows`, interpolated; beyond what was measured, by the
        cost of a row of the greatest. 0 when nothing was measured yet."""
        order, seconds = self._order, self._seconds
        if not order:
            return 0.0
        known = seconds.get(rows)
        if known is not None:
            return known
        at = bisect_left(order, rows)
        if at == 0:
            return seconds[order[0]]
        if at == len(order):
            return seconds[order[-1]] * rows / order[-1]
        low, high = order[at - 1], order[at]
        share = (rows - low) / (high - low)
        return seconds[low] + share * (seconds[high] - seconds[low])

    @property
    def seconds_per_item(self) -> float:
        """Device seconds per request at the batch sizes that are reached. 0: not known."""
        if self._per_item or not self._order:
            return self._per_item
        return self._seconds[self._order[0]] / self._order[0]

    def by_rows(self) -> dict[int, float]:
        return dict(self._seconds)


class Measured:
    """Everything measured of one model on this device, and what was last written down."""

    def __init__(self, estimate_bytes: int, stored: Profile | None) -> None:
        self.stored = stored
        self.loaded = False
        """True once this device itself was measured."""
        self.weights_bytes = stored.weights_bytes if stored else estimate_bytes
        self.workspace = dict(stored.workspace_bytes) if stored else {}
        self.times = BatchTimes(stored.batch_seconds if stored else None)
        self.load_seconds = stored.load_seconds if stored else 0.0

    @property
    def footprint(self) -> Footprint:
        return Footprint(
            weights_bytes=self.weights_bytes,
            workspace_bytes=max(self.workspace.values(), default=0),
            measured=self.loaded or self.stored is not None,
        )

    def load(
        self,
        weights_bytes: int,
        workspace: dict[int, int],
        seconds: dict[int, float],
        load_seconds: float,
    ) -> None:
        self.loaded = True
        self.weights_bytes = weights_bytes
        self.load_seconds = load_seconds
        for rows, taken in workspace.items():
            self.note_workspace(rows, taken)
        for rows, took in seconds.items():
            self.times.measured(rows, took)

    def note_workspace(self, rows: int, taken: int) -> bool:
        """True when the greatest workspace grew by it."""
        before = max(self.workspace.values(), default=0)
        if taken > self.workspace.get(rows, 0):
            self.workspace[rows] = taken
            if len(self.workspace) > _SIZES:
                least = min(self.workspace, key=lambda size: self.workspace[size])
                del self.workspace[least]
        return taken > before

    def to_keep(self, device_kind: str) -> Profile | None:
        """The profile to write down now; None when what is written still holds."""
        if not self.loaded:
            return None
        profile = Profile(
            device_kind=device_kind,
            weights_bytes=self.weights_bytes,
            workspace_bytes=dict(self.workspace),
            batch_seconds=self.times.by_rows(),
            load_seconds=self.load_seconds,
        )
        if self.stored is not None and not _drifted(self.stored, profile):
            return None
        self.stored = profile
        return profile


def _ewma(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)


def _off(old: float, new: float) -> bool:
    return abs(new - old) > _DRIFT * max(old, 1e-9)


def _drifted(old: Profile, new: Profile) -> bool:
    """Bytes count at once. Seconds only for sizes that both know: each run reaches others."""
    if _off(old.weights_bytes, new.weights_bytes):
        return True
    if _off(
        max(old.workspace_bytes.values(), default=0), max(new.workspace_bytes.values(), default=0)
    ):
        return True
    if not old.batch_seconds and new.batch_seconds:
        return True
    both = old.batch_seconds.keys() & new.batch_seconds.keys()
    return any(_off(old.batch_seconds[rows], new.batch_seconds[rows]) for rows in both)
