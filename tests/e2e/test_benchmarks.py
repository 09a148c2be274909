"""The placer's benchmarks, very short: the real stack with executors from a table."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import connections, overhead, reality, spike
from benchmarks.models import TINY
from benchmarks.table import Table
from shared.models import ModelSpec


def test_reality_and_the_simulator_agree_on_a_short_trace():
    """The same requests through both, and nobody is refused. Reality is not better than what is
    simulated, and by no more worse than a machine that others use as well explains; how close
    they really are is what the benchmark tells."""
    compared = asyncio.run(reality.compare(0, seconds=8.0, rate=60.0, seed=1))
    assert (compared.real.ending == 0).all(), "every request was answered"
    assert len(compared.real.latency) == len(compared.simulated.latency) > 300
    assert compared.apart() <= 0.15, str(compared)
    assert compared.real.attainment() >= compared.simulated.attainment() / 2, str(compared)
    real, simulated = reality.loads(compared.real), reality.loads(compared.simulated)
    assert real >= 12, "as many as there is room for were loaded"
    assert simulated / 2 <= real <= simulated * 4, str(compared)


def test_a_spike_binds_a_second_worker():
    """Ten times as many requests for one model: a second worker loads it and answers some of
    them. That no other model moves is the planner's property; here a slow machine may starve
    one."""
    short = {"models": 4, "settle_s": 0.0, "quiet_s": 1.0, "spike_s": 4.0, "load_s": 0.15}
    (spiked,) = asyncio.run(spike.table_run(spiked=1, seed=0, workers=2, warm=False, **short))
    assert spiked.failed == 0, spiked
    assert spiked.reaction_s > 0, spiked  # nan when no second worker answered
    assert sum(spiked.parts.values()) == pytest.approx(spiked.reaction_s), "the parts are the whole"
    assert "150 ms" in spiked.load, "it came from the disk in the time that the table says"
    assert "model-00/1" in spiked.changed, spiked


def test_connections_are_held_and_answered():
    """A few hundred keep-alive connections: none is lost, whatever is asked through them."""
    figures = asyncio.run(connections.measure(300, seed=0))
    value = {figure.name: figure.value for figure in figures}
    assert value["connections held"] == value["connections held afterwards"] == 300
    assert value["all ask at once: no answer"] == 0
    assert value["all ask at once: answered"] > 0


def test_every_way_in_is_measured_against_the_bare_loop():
    """A small model, for moments: all ways answer, and none is faster than the device."""
    figures = asyncio.run(overhead.measure("cpu", TINY, rounds=1, turn_s=1.0, seed=0))
    value = {figure.name: figure.value for figure in figures}
    assert all(figure.value == 0 for figure in figures if "failed" in figure.name), figures
    for way in ("HTTP", "HTTP, two gateways", "gRPC", "AMQP"):
        assert 0 < value[f"tiny: {way}: requests/s over the bare loop's"] < 1.5, figures
        assert value[f"tiny: {way}: requests/s"] > 0


def test_a_table_says_how_long_a_batch_takes():
    """Between two of its sizes linear, beyond the greatest by the cost of a row of that."""
    table = Table(cases=((1, 0.010), (5, 0.030)))
    seconds = [table.seconds(rows) for rows in (1, 3, 5, 10)]
    assert seconds == pytest.approx([0.010, 0.020, 0.030, 0.060])
    with pytest.raises(KeyError):
        Table.of(ModelSpec())
