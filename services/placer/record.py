"""The recorder: what the placer sees asked, as a trace for `roost whatif`.

What came in an interval is what workers were delivered and by how much the queues grew: what
waits counts when it came, not when somebody took it. Redeliveries count again. The cost per tick
is that of the models in new reports, O(active); the file is written in a thread, every
`_WRITE_EVERY_S`, and a disk that fails costs the trace alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog

from services.placer.knowledge import Active, Knowledge
from shared.control import Report
from shared.errors import RoostError
from shared.models import Case, Manifest, Profile
from shared.names import ModelId
from shared.traces import Counts, Header, Line, TracedModel, TracedWorker, bare, member

log = structlog.get_logger(__name__)

INTERVAL_S = 1.0
_WRITE_EVERY_S = 10.0
_WAITING = 3600
"""Intervals that wait for a disk that does not answer; the oldest are given up."""

Measured = Callable[[ModelId, str], Profile | None]
"""What was measured of a model on a kind of device. It reads files."""


class _Counted:
    """Counters of a worker's last report."""

    __slots__ = ("arrived", "from_its_start", "incarnation", "seq")

    def __init__(self, incarnation: str, from_its_start: bool) -> None:
        self.incarnation = incarnation
        self.from_its_start = from_its_start
        """Nothing had been delivered to it when it was first seen: its counters hold no history,
        also of models that it reports later."""
        self.seq = -1
        self.arrived: dict[ModelId, int] = {}


class Recorder:
    """For one event loop. `observe` after every look at the fleet, `close` at the end.

    Law: the sum of all counts of a model is what it was sent while the recorder looked, less what
    is still owed (`_owed`: a queue shrank before the delivery was reported).
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        measured: Measured,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`max_bytes` bounds what lies on the disk: when the file has half of it, it becomes
        `<path>.1`, in place of the one before, and a new one begins."""
        self._path = path
        self._max_bytes = max_bytes
        self._measured = measured
        self._clock = clock
        self._began = 0.0
        self._size = 0
        self._interval = 0
        """Number of the interval that is being counted."""
        self._written_at = 0.0
        self._lines = deque[Line](maxlen=_WAITING)
        self._counts: dict[ModelId, int] = {}
        self._owed: dict[ModelId, int] = {}
        self._arrived: dict[str, _Counted] = {}
        """By worker."""
        self._reports: Sequence[Report] = ()
        self._depths: dict[ModelId, int] = {}
        self._told: dict[ModelId, TracedModel] = {}
        self._untold: dict[ModelId, Active] = {}
        self._workers: dict[str, TracedWorker] = {}
        self._failing = False
        self._writing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Recorder {self._path} {self._size} bytes, {len(self._told)} models>"

    def observe(self, knowledge: Knowledge, depths: Mapping[ModelId, int]) -> None:
        """Takes in the reports that `knowledge` has just seen, and the depths asked for with
        them. Never waits for the disk, nor raises for what becomes of the file."""
        now = self._clock()
        if not self._began:
            self._begin(now)
        self._close_interval(now)
        self._reports = reports = list(knowledge.reports.values())
        self._count_deliveries(reports)
        self._count_depths(depths)
        for model in self._counts:
            active = knowledge.active.get(model)
            if active is not None and active.manifest is not None:
                told = self._told.get(model)
                if told is None or (not told.cases and model not in self._untold):
                    self._untold[model] = active
        self._note_workers(reports, now)
        if now - self._written_at >= _WRITE_EVERY_S and (
            self._writing is None or self._writing.done()
        ):
            self._written_at = now
            self._writing = asyncio.create_task(self._flush(), name="trace")

    async def settled(self) -> None:
        """Returns when nothing is being written."""
        if self._writing is not None:
            await self._writing

    async def close(self) -> None:
        """Writes what is counted so far."""
        await self.settled()
        if self._began:
            self._close_interval(self._clock() + INTERVAL_S)
            await self._flush()

    # --- counting ---------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        self._began = self._written_at = now

    def _close_interval(self, now: float) -> None:
        """What was counted belongs to the interval in which it was seen."""
        number = int((now - self._began) / INTERVAL_S)
        if number <= self._interval:
            return  # the same interval, or a clock that was set back
        came: dict[ModelId, int] = {}
        for model, seen in self._counts.items():
            count = seen + self._owed.pop(model, 0)
            if count > 0:
                came[model] = count
            elif count < 0:
                self._owed[model] = count
        if came:
            self._lines.append(Counts(at=self._interval * INTERVAL_S, requests=came))
        self._counts = {}
        self._interval = number

    def _count_deliveries(self, reports: Sequence[Report]) -> None:
        present = {report.worker for report in reports}
        for gone in self._arrived.keys() - present:
            del self._arrived[gone]
        for report in reports:
            last = self._arrived.get(report.worker)
            if last is None or last.incarnation != report.incarnation:
                fresh = not any(seen.arrived for seen in report.models)
                last = self._arrived[report.worker] = _Counted(report.incarnation, fresh)
                for seen in report.models:
                    # What is in hand has just come; the rest may be history.
                    self._add(seen.model, min(seen.held, seen.arrived))
                    last.arrived[seen.model] = seen.arrived
            elif last.seq != report.seq:
                for seen in report.models:
                    before = last.arrived.get(seen.model)
                    if before is not None and seen.arrived >= before:
                        self._add(seen.model, seen.arrived - before)
                    elif before is not None or last.from_its_start:
                        self._add(seen.model, seen.arrived)
                    else:
                        self._add(seen.model, min(seen.held, seen.arrived))
                    last.arrived[seen.model] = seen.arrived
            last.seq = report.seq

    def _add(self, model: ModelId, count: int) -> None:
        if count:
            self._counts[model] = self._counts.get(model, 0) + count

    def _count_depths(self, depths: Mapping[ModelId, int]) -> None:
        for model, depth in depths.items():
            self._add(model, depth - self._depths.get(model, 0))
            if depth:
                self._depths[model] = depth
            else:
                self._depths.pop(model, None)

    def _note_workers(self, reports: Sequence[Report], now: float) -> None:
        for report in reports:
            told = self._workers.get(report.worker)
            if told is not None and (told.budget_bytes, told.host_bytes, told.device_kind) == (
                report.budget_bytes,
                report.host_budget_bytes,
                report.device_kind,
            ):
                continue
            if report.budget_bytes <= 0:
                continue  # its engine has not said yet what the device has
            self._workers[report.worker] = TracedWorker(
                at=round(now - self._began, 3),
                worker=report.worker,
                device_kind=report.device_kind,
                budget_bytes=report.budget_bytes,
                host_bytes=report.host_budget_bytes,
                labels=report.labels,
            )
            self._lines.append(self._workers[report.worker])

    # --- writing ----------------------------------------------------------------------------

    async def _flush(self) -> None:
        lines, self._lines = list(self._lines), deque(maxlen=_WAITING)
        workers = list(self._workers.values())
        untold, self._untold = self._untold, {}
        seen = {
            each.model: (report.device_kind, each.seconds_per_item, each.load_seconds)
            for report in self._reports
            for each in report.models
            if each.model in untold
        }
        try:
            await asyncio.to_thread(self._write, lines, untold, seen, workers)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends no placer
            if not self._failing:
                log.warning("trace_not_written", path=str(self._path), error=repr(error))
            self._failing = True
        else:
            self._failing = False

    def _write(
        self,
        lines: list[Line],
        untold: Mapping[ModelId, Active],
        seen: Mapping[ModelId, tuple[str, float, float]],
        workers: Sequence[TracedWorker],
    ) -> None:
        """Raises `OSError`; the next one then begins where this one did."""
        told: dict[ModelId, TracedModel] = {}
        for model, active in untold.items():
            if active.manifest is None:
                continue
            facts = self._facts(active.manifest, active, seen.get(model, ("", 0.0, 0.0)))
            if facts != self._told.get(model):
                told[model] = facts
        known = self._told | told
        lines = [*told.values(), *(_only_of(known, line) for line in lines)]
        if not lines:
            return
        if self._size >= self._max_bytes / 2 or (not self._size and self._path.exists()):
            # Half of what may lie there, or what an earlier placer has recorded.
            self._path.replace(f"{self._path}.1")
            self._size = 0
        if not self._size:  # it stands for itself, whatever was told in the one before
            told_before: list[Line] = [*self._told.values(), *workers]
            again = [each for each in told_before if each not in lines]
            header = Header(interval_s=INTERVAL_S, began_at=self._began, source="placer")
            lines = [header, *again, *lines]
        data = member(lines)
        with self._path.open("r+b" if self._size else "wb") as file:
            file.seek(self._size)
            file.truncate()  # what a write that failed has left
            file.write(data)
        self._size += len(data)
        self._told = known

    def _facts(
        self, manifest: Manifest, active: Active, seen: tuple[str, float, float]
    ) -> TracedModel:
        kind, seconds_per_item, load_seconds = seen
        kind = kind or next(iter(active.known), "")
        profile = None
        if kind:
            try:
                profile = self._measured(manifest.id, kind)
            except RoostError as error:
                log.info("profile_not_read", model=manifest.id, error=str(error))
        size = active.known.get(kind) or active.estimate
        weights = manifest.size_bytes if size is None else size.weights_bytes
        if profile is not None and profile.cases:
            return TracedModel(
                manifest=bare(manifest),
                device_kind=kind,
                cases=tuple(case for case in profile.cases if case.seconds > 0),
                weights_bytes=weights,
                load_seconds=profile.load_seconds or load_seconds,
                swap_seconds=profile.swap_seconds,
            )
        return TracedModel(
            manifest=bare(manifest),
            device_kind=kind,
            cases=(Case(1, 0, seconds_per_item),) if seconds_per_item > 0 else (),
            weights_bytes=weights,
            load_seconds=load_seconds,
        )


def _only_of(known: Mapping[ModelId, TracedModel], line: Line) -> Line:
    """A model that was gone before anything was known of it cannot be asked again."""
    if not isinstance(line, Counts):
        return line
    told = {model: count for model, count in line.requests.items() if model in known}
    return Counts(at=line.at, requests=told)
