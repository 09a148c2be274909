"""The recorder: everything that came is counted once, in bounded files."""

from __future__ import annotations

import msgspec
import pytest

from services.placer.core.policy import Policy
from services.placer.knowledge import Knowledge
from services.placer.record import Recorder
from shared.control import ModelReport, Report
from shared.errors import Unavailable
from shared.models import Case, Footprint, Manifest, Profile
from shared.names import ModelId
from shared.traces import read_trace

A, B = ModelId("a/1"), ModelId("b/1")


class Rig:
    def __init__(self, path, max_bytes=1 << 20, measured=lambda model, kind: None):
        self.now = 1000.0
        self.knowledge = Knowledge(Policy(), clock=lambda: self.now)
        for model in (A, B):
            name = model.split("/")[0]
            self.knowledge.activate(
                model,
                Manifest(
                    name=name, version=1, digest="sha256:" + "0" * 64, size_bytes=5, created_at=0.0
                ),
                why="test",
            )
        self.path = path
        self.recorder = Recorder(path, max_bytes, measured, clock=lambda: self.now)
        self.seq = 0

    async def look(self, *models, worker="w", incarnation="i", depths=None, step=0.25):
        self.seq += 1
        report = Report(
            worker=worker, incarnation=incarnation, seq=self.seq, at=self.now, device_kind="cpu",
            device_name="", budget_bytes=100, used_bytes=0, measured_bytes=0,
            models=tuple(
                ModelReport(
                    model=model, tier="device", phase="ready", bound=True, held=held,
                    footprint=Footprint(7), arrived=arrived, seconds_per_item=0.25,
                    load_seconds=2.0,
                )
                for model, arrived, held in models
            ),
        )  # fmt: skip
        if worker not in self.knowledge.assigned:
            self.knowledge.adopt(worker, {}, 0)
        self.knowledge.see([report], depths or {}, self.now)
        self.recorder.observe(self.knowledge, depths or {})
        await self.recorder.settled()
        self.now += step

    async def counted(self):
        await self.recorder.close()
        trace = read_trace(self.path)
        total = {}
        for counts in trace.counts:
            for model, count in counts.requests.items():
                total[model] = total.get(model, 0) + count
        return total


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path / "trace")


async def test_deliveries_are_counted_in_their_second(rig):
    """What counters grew by within a second is that second's count."""
    await rig.look()
    for arrived in (2, 5, 9, 9, 30):
        await rig.look((A, arrived, 0))
    await rig.recorder.close()
    trace = read_trace(rig.path)
    assert [(each.at, each.requests) for each in trace.counts] == [
        (0.0, {A: 9}),
        (1.0, {A: 21}),
    ]
    assert trace.header.began_at == 1000.0
    assert trace.workers[0].budget_bytes == 100


async def test_what_waits_counts_when_it_came(rig):
    """A queue that grows is requests; when it is taken later, they are not counted again."""
    await rig.look()
    await rig.look((A, 10, 0), depths={A: 50}, step=2.0)
    await rig.look((A, 30, 0), depths={A: 30}, step=2.0)
    await rig.look((A, 60, 0), depths={A: 0}, step=2.0)
    await rig.recorder.close()
    trace = read_trace(rig.path)
    assert [each.requests for each in trace.counts] == [{A: 60}]


async def test_a_queue_read_before_the_report_is_made_even(rig):
    """Depths and reports are not of one moment: what is missing in one second is taken from the
    next, and the sum is right."""
    await rig.look()
    await rig.look((A, 10, 0), depths={A: 50}, step=1.0)
    await rig.look((A, 10, 0), depths={A: 20}, step=1.0)
    await rig.look((A, 60, 0), depths={A: 0}, step=1.0)
    assert await rig.counted() == {A: 60}


async def test_history_is_not_counted(rig):
    """What a worker had counted before it was first seen is no request of ours, but what it has
    in hand is; nor is an idle model's old counter when it comes back."""
    await rig.look((A, 5000, 3))
    await rig.look((A, 5001, 0), (B, 7000, 2))
    assert await rig.counted() == {A: 4, B: 2}


async def test_counters_of_a_new_incarnation_start_again(rig):
    """A restarted worker's counters are neither negative nor lost."""
    await rig.look()
    await rig.look((A, 10, 0))
    await rig.look(incarnation="j")
    await rig.look((A, 4, 0), incarnation="j")
    assert await rig.counted() == {A: 14}


async def test_a_report_that_was_seen_counts_once(rig):
    """The placer looks more often than workers report."""
    await rig.look()
    await rig.look((A, 10, 0))
    for _ in range(3):
        rig.recorder.observe(rig.knowledge, {})
    assert await rig.counted() == {A: 10}


async def test_facts_come_from_the_profile(tmp_path):
    """Measured batches stand in the trace; where none are kept, what the worker reports."""

    def measured(model, kind):
        if model == B:
            raise Unavailable("the repository is away")
        return Profile(
            device_kind=kind, weights_bytes=7, cases=(Case(1, 0, 0.5), Case(8, 0, 1.0)),
            load_seconds=3.0, swap_seconds=0.5,
        )  # fmt: skip

    rig = Rig(tmp_path / "trace", measured=measured)
    await rig.look()
    await rig.look((A, 1, 0), (B, 1, 0))
    await rig.recorder.close()
    models = read_trace(rig.path).models
    assert [case.rows for case in models[A].cases] == [1, 8]
    assert (models[A].load_seconds, models[A].swap_seconds) == (3.0, 0.5)
    assert models[B].cases == (Case(1, 0, 0.25),)
    assert (models[B].load_seconds, models[B].weights_bytes) == (2.0, 7)


async def test_files_are_bounded_and_each_stands_for_itself(tmp_path):
    """However long it records, two files of half the limit (and one write) lie there, and the
    newer can be read alone."""
    rig = Rig(tmp_path / "trace", max_bytes=4000)
    await rig.look()
    for number in range(1, 400):
        await rig.look((A, number * 7, 0), (B, number * number, 0), step=10.0)
    await rig.recorder.close()
    old = tmp_path / "trace.1"
    assert rig.path.stat().st_size + old.stat().st_size < 5000
    assert {file.name for file in tmp_path.iterdir()} == {"trace", "trace.1"}
    newer, older = read_trace(rig.path), read_trace(old)
    assert set(newer.models) == {A, B}
    assert newer.workers
    assert newer.counts[0].at > older.counts[-1].at


async def test_an_earlier_recording_is_kept(tmp_path):
    """A placer that starts again moves the last one's trace aside."""
    for size in (3, 4):
        rig = Rig(tmp_path / "trace")
        await rig.look()
        await rig.look((A, size, 0))
        await rig.recorder.close()
    assert read_trace(tmp_path / "trace.1").requests == 3
    assert read_trace(tmp_path / "trace").requests == 4


async def test_a_disk_that_fails_costs_the_trace_alone(tmp_path):
    """The placer goes on; when the folder is back, recording goes on as well."""
    rig = Rig(tmp_path / "away" / "trace")
    await rig.look()
    await rig.look((A, 3, 0), step=11.0)
    await rig.look((A, 4, 0), step=11.0)
    assert not rig.path.exists()
    (tmp_path / "away").mkdir()
    await rig.look((A, 10, 0))
    assert await rig.counted() == {A: 7}


async def test_who_is_gone_unknown_is_left_out(rig):
    """A model of which nothing was ever known makes no line that a reader cannot place."""
    await rig.look()
    await rig.look((ModelId("ghost/1"), 9, 0), (A, 1, 0))
    assert await rig.counted() == {A: 1}


async def test_many_idle_models_cost_nothing(rig):
    """Registered or active but not asked: no line of them."""
    for number in range(200):
        manifest = msgspec.structs.replace(rig.knowledge.active[A].manifest, name=f"idle{number}")
        rig.knowledge.activate(manifest.id, manifest, why="test")
    await rig.look()
    await rig.look((A, 1, 0))
    await rig.recorder.close()
    assert set(read_trace(rig.path).models) == {A}


async def test_half_a_write_is_written_over(rig):
    """A disk that fills up in the middle leaves no damage behind."""
    await rig.look()
    await rig.look((A, 3, 0), step=11.0)
    await rig.look((A, 4, 0), step=11.0)
    with rig.path.open("ab") as file:
        file.write(b"\x1f\x8b half of a member")
    await rig.look((A, 5, 0))
    assert await rig.counted() == {A: 5}
