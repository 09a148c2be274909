"""The soak, short: what comes and goes with each load and eviction is gone afterwards."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import soak

CYCLES, SAMPLES = 120, 4
COUNTED = (
    "open files", "threads", "RabbitMQ: queues", "RabbitMQ: exchanges", "RabbitMQ: bindings",
    "RabbitMQ: connections", "RabbitMQ: channels", "RabbitMQ: consumers", "RabbitMQ: messages",
    "Redis: keys", "Redis: connections", "repository: files", "services' data: files",
)  # fmt: skip


@pytest.mark.services
@pytest.mark.timeout(600)
def test_loading_and_evicting_leaves_nothing_behind():
    """120 model changes on the real stack, of every kind of model and by every way in: all answers
    are right, and of nothing there is more at the end than pools take. A thing that stayed behind
    of each would be there 90 times."""
    soaked = asyncio.run(soak.measure(CYCLES, samples=SAMPLES))
    assert soaked.wrong == []
    assert soaked.answered == soaked.cycles == CYCLES
    assert min(soaked.loads, soaked.evictions) >= 0.9 * CYCLES
    assert soaked.engines_lost == 0
    found = {name: (values[0], values[-1]) for name, values in soaked.series.items()}
    counted = {name: ends for name, ends in found.items() if name.endswith(COUNTED)}
    assert len(counted) >= len(COUNTED)
    since = soaked.at[-1] - soaked.at[0]
    more = {name: ends for name, ends in counted.items() if ends[1] - ends[0] > since / 5}
    assert not more, more
