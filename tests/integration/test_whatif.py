"""From a placer that serves to the question of how many workers its load needs."""

from __future__ import annotations

import asyncio
import json

import pytest

from roost.__main__ import main
from shared.traces import read_trace
from tests.placer_rig import MB, memory_rig, until


@pytest.fixture
async def rig(tmp_path):
    async with memory_rig(tmp_path / "repository") as rig:
        yield rig


async def test_a_placer_records_what_whatif_replays(rig, tmp_path, capsys):
    """Every request of the run is in the trace, cold starts included, with what the worker has
    measured; the simulator answers it with that fleet."""
    path = tmp_path / "trace"
    models = [rig.register(f"m{number}", max_batch_size=8, target_ms=5000.0) for number in range(3)]
    await rig.start_worker("w0", models=4)
    placer = await rig.start_placer(record=str(path))
    for number, model in enumerate(models):
        for _ in range(5 * (number + 1)):
            await rig.ask(model)
    (worker,) = rig.workers
    last = worker.reports
    await until(lambda: worker.reports >= last + 3)  # the placer has seen the last of them
    await asyncio.wait_for(placer.end(), 10)

    trace = read_trace(path)
    asked = dict.fromkeys(models, 0)
    for counts in trace.counts:
        for model, count in counts.requests.items():
            asked[model] += count
    assert asked == {model: 5 * (number + 1) for number, model in enumerate(models)}
    assert [each.budget_bytes for each in trace.workers] == [4 * MB]
    assert all(trace.models[model].cases[0].seconds == 0.001 for model in models)

    line = ["whatif", "--trace", str(path), "--workers", "1..2", "--json", "--target", "0.5"]
    capsys.readouterr()  # the placer's own lines
    assert await asyncio.to_thread(main, line) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["workers"] == 1
    assert told["tried"][0]["requests"] == 30


async def test_nothing_is_recorded_unless_asked(rig, tmp_path):
    """Without the setting no file appears."""
    model = rig.register("m")
    await rig.start_worker("w0")
    placer = await rig.start_placer()
    await rig.ask(model)
    await placer.end()
    assert not list(tmp_path.glob("trace*"))
