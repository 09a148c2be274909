"""What one model was measured to take: seconds and bytes, by a batch's rows and its size.

The *size* of a batch is that of the model's padded dimension; 0 for a model without one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from services.worker.wire import ModelLoaded, WarmUp
from shared.layout import Layout, Share
from shared.models import MAX_PADDING_SIZES, Case, Footprint, ModelSpec, Profile

_WEIGHT = 0.2
"""Of a new measurement in the moving average: five or so forget a slow start."""
_ROWS = 64
"""Numbers of rows remembered of each size; enough to interpolate between, whatever
`max_batch_size` is."""
_SIZES = 2 * MAX_PADDING_SIZES
"""Sizes remembered: all that are declared, and some of what is longer than the greatest."""
_WORKSPACES = 256
_DRIFT = 0.10
"""A profile that is further off than this is written again."""


class _Curve:
    """Moving averages of the seconds that batches of one size take, by their rows."""

    __slots__ = ("order", "seconds")

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.order: list[int] = []

    def measured(self, rows: int, seconds: float) -> None:
        known = self.seconds.get(rows)
        self.seconds[rows] = _ewma(known, seconds)
        if known is not None:
            return
        if len(self.seconds) > _ROWS:
            # Keep the ends, drop every second number between: interpolation fills the gaps.
            kept = self.order[:1] + self.order[2:-1:2] + self.order[-1:]
            self.seconds = {each: self.seconds[each] for each in {*kept, rows}}
        self.order = sorted(self.seconds)

    def estimate(self, rows: int) -> float:
        order, seconds = self.order, self.seconds
        at = bisect_left(order, rows)
        if at == 0:
            return seconds[order[0]]
        if at == len(order):
            return seconds[order[-1]] * rows / order[-1]
        low, high = order[at - 1], order[at]
        share = (rows - low) / (high - low)
        return seconds[low] + share * (seconds[high] - seconds[low])


class BatchTimes:
    """Moving averages of the seconds that a batch takes, by its rows and its size."""

    def __init__(self, cases: Iterable[Case] = ()) -> None:
        self._curves: dict[int, _Curve] = {}
        """The size measured last stands last."""
        self._per_item = 0.0
        for case in cases:
            self._note(case.rows, case.size, case.seconds)

    def __repr__(self) -> str:
        shown = {(rows, size): round(seconds, 6) for rows, size, seconds in self.measurements()}
        return f"BatchTimes({shown})"

    def measured(self, rows: int, size: int, seconds: float, items: int = 1) -> None:
        """A batch of `rows` rows, of `items` requests, took `seconds`."""
        if self._note(rows, size, seconds):
            self._per_item = _ewma(self._per_item or None, seconds / max(items, 1))

    def learn(self, case: Case) -> None:
        """Takes a measurement of another model's for its own, until there is one."""
        if not self.knows(case.rows, case.size):
            self._note(case.rows, case.size, case.seconds)

    def _note(self, rows: int, size: int, seconds: float) -> bool:
        if rows < 1 or size < 0 or seconds <= 0:
            return False
        curve = self._curves.pop(size, None) or _Curve()
        self._curves[size] = curve
        curve.measured(rows, seconds)
        if len(self._curves) > _SIZES:
            del self._curves[next(iter(self._curves))]
        return True

    def knows(self, rows: int, size: int) -> bool:
        curve = self._curves.get(size)
        return curve is not None and rows in curve.seconds

    def estimate(self, rows: int, size: int = 0) -> float:
        """Seconds for a batch; 0 when nothing was measured yet. Interpolated between numbers of
        rows, beyond them by the cost of a row of the greatest. A size that was never measured
        costs as much, element for element, as the next greater one: rather too much than too
        little where time grows faster than the size, as it does in attention."""
        curve = self._curves.get(size)
        if curve is not None:
            known = curve.seconds.get(rows)
            return curve.estimate(rows) if known is None else known
        if not self._curves:
            return 0.0
        greater = [each for each in self._curves if each > size]
        nearest = min(greater) if greater else max(self._curves)
        scale = size / nearest if size and nearest else 1.0
        return self._curves[nearest].estimate(rows) * scale

    @property
    def seconds_per_item(self) -> float:
        """Device seconds per request at the batch sizes that are reached. 0: not known."""
        if self._per_item or not self._curves:
            return self._per_item
        size = min(self._curves)
        rows = self._curves[size].order[0]
        return self._curves[size].seconds[rows] / rows

    def measurements(self) -> Iterator[tuple[int, int, float]]:
        """Rows, size and seconds of each case."""
        for size, curve in self._curves.items():
            for rows in curve.order:
                yield rows, size, curve.seconds[rows]


class Measured:
    """Everything measured of one model on this device, and what was last written down."""

    def __init__(
        self,
        estimate_bytes: int,
        stored: Profile | None,
        layout: Layout | None = None,
        share: bool = True,
    ) -> None:
        """`estimate_bytes` stands for the weights until something better is known: what was
        `stored`, or the file's `layout`. With `share`, what the layout says is had in common
        counts once per device."""
        self.stored = stored
        self.loaded = False
        """True once this device itself was measured."""
        self.times = BatchTimes(stored.cases if stored else ())
        self.workspace: dict[tuple[int, int], int] = {}
        """Greatest bytes seen, by rows and size."""
        self._greatest = 0
        for case in stored.cases if stored else ():
            self.note_workspace(case.rows, case.size, case.workspace_bytes)
        self.load_seconds = stored.load_seconds if stored else 0.0
        self.swap_seconds = stored.swap_seconds if stored else 0.0
        apart = layout if layout is not None and layout.obstacle is None else None
        self._apart_bytes = apart.weights_bytes if apart else 0
        self.shares: tuple[Share, ...] = apart.shares if apart and share else ()
        self.weights_bytes = self._apart_bytes or estimate_bytes
        if stored is not None:
            self.weights_bytes = self._at_least(stored.weights_bytes)

    @property
    def footprint(self) -> Footprint:
        return Footprint(
            weights_bytes=self.weights_bytes,
            workspace_bytes=self._greatest,
            # A profile of before there were cases says nothing of the workspace.
            measured=self.loaded or (self.stored is not None and bool(self.stored.cases)),
            shares=self.shares,
        )

    def load(self, fact: ModelLoaded) -> None:
        """The engine has brought the model into one of its tiers."""
        if fact.tier == "host":
            if not self.loaded:
                self.weights_bytes = self._at_least(fact.weights_bytes)
            return
        self.loaded = True
        if fact.architecture == "none":
            self.shares = ()  # loaded as a whole: all of it is its own
        self.weights_bytes = self._at_least(fact.weights_bytes)
        if fact.source == "host":
            self.swap_seconds = _ewma(self.swap_seconds or None, fact.load_seconds)
        else:
            self.load_seconds = fact.load_seconds
        for case in fact.cases:
            self.note_workspace(case.rows, case.size, case.workspace_bytes)
            if fact.architecture == "known":
                self.times.learn(case)
            else:
                self.times.measured(case.rows, case.size, case.seconds)

    def _at_least(self, weights_bytes: int) -> int:
        """Shares are counted in whole blocks: so must be the weights that they are part of."""
        return max(weights_bytes, self._apart_bytes) if self.shares else weights_bytes

    def note_workspace(self, rows: int, size: int, taken: int) -> bool:
        """True when the greatest workspace grew by it."""
        if taken > self.workspace.get((rows, size), 0):
            self.workspace[rows, size] = taken
            if len(self.workspace) > _WORKSPACES:
                del self.workspace[min(self.workspace, key=self.workspace.__getitem__)]
        grew = taken > self._greatest
        self._greatest = max(self._greatest, taken)
        return grew

    def cases(self) -> tuple[Case, ...]:
        """All that was measured, by rows and size."""
        seconds = {(rows, size): took for rows, size, took in self.times.measurements()}
        return tuple(
            Case(*key, seconds.get(key, 0.0), self.workspace.get(key, 0))
            for key in sorted(seconds.keys() | self.workspace.keys())
        )

    def to_keep(self, device_kind: str) -> Profile | None:
        """The profile to write down now; None when what is written still holds."""
        if not self.loaded:
            return None
        profile = Profile(
            device_kind=device_kind,
            weights_bytes=self.weights_bytes,
            cases=self.cases(),
            load_seconds=self.load_seconds,
            swap_seconds=self.swap_seconds,
        )
        if self.stored is not None and not _drifted(self.stored, profile):
            return None
        self.stored = profile
        return profile


def warm_ups(spec: ModelSpec, measured: Measured) -> tuple[WarmUp, ...]:
    """What to run before a model is called loaded: the smallest batch and the greatest, in
    each size that is declared; of what was measured before only the smallest, which is enough
    to have everything ready. The small ones come first."""
    if spec.stateful:
        return ()  # a run would change its state
    sizes = spec.padding.sizes if spec.padding is not None else (0,)
    rows = {1} if measured.footprint.measured else {1, max(spec.max_batch_size, 1)}
    return tuple(WarmUp(each, size) for each in sorted(rows) for size in sizes)


def _ewma(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)


def _off(old: float, new: float) -> bool:
    return abs(new - old) > _DRIFT * max(old, 1e-9)


def _drifted(old: Profile, new: Profile) -> bool:
    """Bytes count at once. Seconds only for cases that both know, since each run reaches others;
    but of a size of which nothing is known, and of the swap, the first measurement counts."""
    if _off(old.weights_bytes, new.weights_bytes) or _off(old.workspace_bytes, new.workspace_bytes):
        return True
    if new.swap_seconds and not old.swap_seconds:
        return True
    known = {(case.rows, case.size): case.seconds for case in old.cases if case.seconds}
    timed = [case for case in new.cases if case.seconds]
    if {case.size for case in timed} - {size for _, size in known}:
        return True
    return any(
        (case.rows, case.size) in known and _off(known[case.rows, case.size], case.seconds)
        for case in timed
    )
