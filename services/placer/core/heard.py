"""What each worker told last, and the new reports of one look as columns.

Workers report whole, and four times a second. Most of what is new in a report are numbers: they
go from column to column, a row for each model of each worker. Models are looked at one by one
only where anything else is new (`core.news`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from services.placer.core.columns import Floats, Ints
from services.placer.core.news import News, state
from services.placer.core.tracked import Tracked
from shared.control import ModelReport, Report
from shared.names import ModelId

SHORTEST_INTERVAL_S = 0.05
"""Two reports closer than this are taken as one: a rate over less is noise."""
_NUMBERS = ("held", "seconds_per_item", "load_seconds", "arrived")
HELD, SECONDS, LOAD_SECONDS, ARRIVED = range(len(_NUMBERS))
_TIMES = slice(SECONDS, LOAD_SECONDS + 1)
_NO_ROWS: Ints = np.zeros(0, np.int64)
_NO_NUMBERS: Floats = np.zeros(0)


class Heard:
    """What was last told and counted of one worker. Its columns have a row for each of `names`."""

    __slots__ = (
        "_counted", "_counted_dropped", "_counted_names", "_less", "at", "base", "dropped",
        "incarnation", "left", "measured", "models", "names", "numbers", "own", "report", "rows",
        "seen", "seq", "states",
    )  # fmt: skip

    def __init__(self, report: Report, now: float) -> None:
        """Of a worker of which this is the first report, to be taken in yet."""
        self.report: Report | None = None
        self.models: dict[ModelId, ModelReport] = {}
        """All that it told; never changed."""
        self.names: list[ModelId] = []
        """Of these, in their order."""
        self.states: list[tuple[object, ...]] = []
        """`news.state` of each."""
        self.numbers: Floats = np.zeros((len(_NUMBERS), 0))
        """And `_NUMBERS`: a row for each of those, a column for each model."""
        self.rows: Ints = _NO_ROWS
        """Of the models, in `Tracked`."""
        self.base: Floats = _NO_NUMBERS
        """Counters as counted last; nan: not told then."""
        self.left: dict[ModelId, float] = {}
        """Likewise, of models that were told of since, and are not any more."""
        self._counted: Ints = _NO_ROWS
        """Rows of the models that were counted last,"""
        self._counted_names: Sequence[ModelId] = ()
        self._counted_dropped = 0
        self._less: Floats = np.zeros((2, 0))
        """and, negative, their requests per second since the count before: all, and what of them
        is no chance."""
        self.measured: Ints | None = None
        """Rows of the models that it has measured; None: to be found anew."""
        self.own = 0.0
        """Sum of its own seconds per request of these."""
        self.dropped = 0
        """`Tracked.dropped` when the rows were found."""
        self.count_from(report, now)

    def __repr__(self) -> str:
        return f"<Heard {len(self.names)} models, of {self.incarnation} #{self.seq}>"

    def count_from(self, report: Report, now: float) -> None:
        """Arrivals are counted from this report on."""
        self.incarnation = report.incarnation
        self.seq = report.seq
        self.at = report.at
        self.seen = now
        self.left = {}

    def interval_s(self, report: Report, now: float) -> float:
        """The seconds in which came what this report counts; 0: it is not to be counted."""
        if self.incarnation != report.incarnation:
            elapsed = now - self.seen
        elif self.seq == report.seq:
            return 0.0
        else:
            elapsed = report.at - self.at
            elapsed = now - self.seen if elapsed < 0 else elapsed
        return elapsed if elapsed >= SHORTEST_INTERVAL_S else 0.0

    def follow(self, rows: Tracked) -> None:
        """Rows are those of `rows` again, of which some were dropped."""
        if self.dropped == rows.dropped:
            return
        self.rows = _rows_of(self.names, rows)
        self.measured = None
        self.dropped = rows.dropped

    def counted(self, rows: Tracked) -> tuple[Ints, Floats]:
        """Rows of the models that were counted last, and `less` of these: what they are to lose
        before they are counted again. Those that have no row any more are left out."""
        if self._counted_dropped != rows.dropped:
            self._counted = _rows_of(self._counted_names, rows)
        if (self._counted >= 0).all():
            return self._counted, self._less
        kept = self._counted >= 0
        return self._counted[kept], self._less[:, kept]

    def count(
        self, report: Report, less: Floats, arrived: Floats, rows: Tracked, now: float
    ) -> None:
        """Its models were counted. `less`: what to take back when they are counted again."""
        self._counted, self._counted_names, self._counted_dropped = (
            self.rows,
            self.names,
            rows.dropped,
        )
        self._less, self.base = less, arrived
        self.count_from(report, now)

    def lay_out(self, told: Sequence[ModelReport], was: list[int], rows: Tracked) -> None:
        """From now on it tells of these models, each once and with a row. `was`: where each was
        among `names`; -1: nowhere."""
        first, before = self.report is None, self.base
        if self.names:
            self.rows, self.base = self.rows[was], before[was]
            self.numbers = self.numbers[:, was]
        else:
            self.rows, self.base = np.zeros(len(was), np.int64), np.zeros(len(was))
            self.numbers = np.zeros((len(_NUMBERS), len(was)))
        kept = 0
        for number, (each, at) in enumerate(zip(told, was, strict=True)):
            if at >= 0:
                kept += 1
                continue
            self.rows[number] = rows.row[each.model]
            self.base[number] = each.arrived if first else self.left.get(each.model, np.nan)
            self.numbers[:, number] = 0.0
        if kept < len(self.names):
            for at in set(range(len(self.names))).difference(was):
                self.left[self.names[at]] = float(before[at])
        self.names, self.measured = [each.model for each in told], None

    def forget(self, model: ModelId) -> None:
        """What it tells of the model next is new."""
        if model not in self.models:
            return
        number = self.names.index(model)
        self.names = [name for name in self.names if name != model]
        self.models = {name: told for name, told in self.models.items() if name != model}
        self.states = self.states[:number] + self.states[number + 1 :]
        self.numbers = np.delete(self.numbers, number, axis=1)
        self.rows = np.delete(self.rows, number)
        self.base = np.delete(self.base, number)
        self.measured = None

    def measure(self) -> None:
        """Finds which models it has measured, where that is not known."""
        if self.measured is None:
            seconds = self.numbers[SECONDS]
            self.measured = self.rows[seconds > 0]
            self.own = math.fsum(seconds[seconds > 0].tolist())


class Look:
    """New reports, each of another worker, and what of them is new, as columns: the models of the
    first, then those of the second, and so on."""

    def __init__(self, fresh: Sequence[tuple[Heard, Report]], rows: Tracked, now: float) -> None:
        self.fresh = fresh
        self.elapsed = [heard.interval_s(report, now) for heard, report in fresh]
        """Seconds of each report (`Heard.interval_s`)."""
        self.gone: dict[int, list[ModelReport]] = {}
        """By report: what was told before of models that it does not mention."""
        self._changed: dict[int, list[tuple[ModelReport | None, ModelReport]]] = {}
        """By report: `News.changed`."""
        self.lengths: list[int] = []
        held, arrived = list[int](), list[int]()
        seconds, load_seconds = list[float](), list[float]()
        # Report by report, and all of a model at once: what is slow is to fetch it from memory.
        for number, (heard, report) in enumerate(fresh):
            heard.follow(rows)
            told = self._take(number, heard, report, rows, now)
            held += [each.held for each in told]
            seconds += [each.seconds_per_item for each in told]
            load_seconds += [each.load_seconds for each in told]
            arrived += [each.arrived for each in told]
            self.lengths.append(len(told))
            heard.report = report
        self.number: Ints = np.repeat(np.arange(len(fresh)), self.lengths)
        """Of which report each is."""
        self.rows: Ints = np.concatenate([heard.rows for heard, _ in fresh])
        self.base: Floats = np.concatenate([heard.base for heard, _ in fresh])
        """Counters as counted last; nan: not told then."""
        self.was: Floats = np.concatenate([heard.numbers for heard, _ in fresh], axis=1)
        """Numbers as told before, and as told now, a row for each of `_NUMBERS`."""
        self.now: Floats = np.array((held, seconds, load_seconds, arrived), float)
        for heard, start, end in self.parts():
            heard.numbers = self.now[:, start:end]
        self._timed = (self.was[_TIMES] != self.now[_TIMES]).any(axis=0)
        for n in set(self.number[self._timed].tolist()):
            fresh[n][0].measured = None

    def __repr__(self) -> str:
        return f"<Look at {len(self.rows)} models in {len(self.fresh)} reports>"

    def parts(self) -> Iterator[tuple[Heard, int, int]]:
        """Each worker, and where what it tells begins and ends."""
        start = 0
        for (heard, _), length in zip(self.fresh, self.lengths, strict=True):
            yield heard, start, start + length
            start += length

    def news(self) -> dict[str, News]:
        """By worker."""
        changed, gone = self._changed, self.gone
        timed = set(self.number[self._timed].tolist())
        return {
            report.worker: News(heard.models, changed.get(n, ()), gone.get(n, ()), n in timed)
            for n, (heard, report) in enumerate(self.fresh)
        }

    def _take(
        self, number: int, heard: Heard, report: Report, rows: Tracked, now: float
    ) -> Sequence[ModelReport]:
        """What a report tells of models, each of them once."""
        told: Sequence[ModelReport] = report.models
        names, was = [each.model for each in told], heard.models
        if names == heard.names:
            heard.models = dict(zip(heard.names, told, strict=True))
            states = list(map(state, told))
            if states != heard.states:
                pairs = zip(heard.states, states, heard.names, strict=True)
                others = [name for before, after, name in pairs if before != after]
                self._changed[number] = [(was[name], heard.models[name]) for name in others]
                heard.states = states
        else:
            heard.models = {each.model: each for each in told}
            told = list(heard.models.values())
            had = {name: at for at, name in enumerate(heard.names)}
            before = [had.get(name, -1) for name in heard.models]
            states = list(map(state, told))
            self._changed[number] = [
                (was[each.model] if at >= 0 else None, each)
                for each, at, said in zip(told, before, states, strict=True)
                if at < 0 or heard.states[at] != said
            ]
            if len(was) + before.count(-1) > len(told):
                self.gone[number] = [was[name] for name in heard.names if name not in heard.models]
            for each in told:
                if each.model not in rows.row:
                    # Who is new to us all was last asked when its worker says, unless that
                    # is not counted yet.
                    counts = heard.report is None or self.elapsed[number]
                    rows.take(each.model, last_used(each, report, now) if counts else now)
            heard.lay_out(told, before, rows)
            heard.states = states
        if self.elapsed[number] and heard.incarnation != report.incarnation:
            heard.base = np.zeros(len(told))
        return told


def last_used(model: ModelReport, report: Report, now: float) -> float:
    """On our clock. Both times are the worker's own, so clocks need not agree."""
    return now - max(report.at - model.last_used, 0.0) if model.last_used else now


def _rows_of(names: Sequence[ModelId], rows: Tracked) -> Ints:
    """-1: it has none."""
    return np.array([rows.row.get(name, -1) for name in names], np.int64)
