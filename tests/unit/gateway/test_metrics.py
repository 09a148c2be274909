"""What a gateway counts under Triton's names: only what nobody else has."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.core.tally import Tallies
from services.gateway.metrics import Metrics
from services.gateway.registry import Registry
from shared.catalog import Catalog
from shared.models import ModelSpec
from shared.nvmetrics import encoder
from shared.repository import Repository
from shared.store.memory import MemoryState, MemoryStore
from shared.store.port import TOPIC_REGISTRY
from tests.archives import torchscript
from tests.gateway_rig import until


@pytest.fixture
def metrics():
    return Metrics(late_s=0.05)


def failed(metrics: Metrics, model: str = "bert") -> dict[str, float]:
    """By reason, those that are not 0."""
    lines = encoder("")[0](metrics.registry).decode().splitlines()
    begin = f'nv_inference_request_failure{{model="{model}",reason="'
    told = (line.removeprefix(begin).split('"', 1) for line in lines if line.startswith(begin))
    counts = {reason: float(rest.rpartition(" ")[2]) for reason, rest in told}
    return {reason: count for reason, count in counts.items() if count}


@pytest.mark.parametrize(
    ("code", "reason"),
    [("resource_exhausted", "REJECTED"), ("invalid_argument", "OTHER"), ("unavailable", "OTHER")],
)
def test_what_was_never_sent_counts_at_once(metrics, code, reason):
    """A full queue is a rejection here; the device's memory is nothing that a gateway runs out
    of."""
    metrics.refused("bert/1", code)
    assert failed(metrics) == {reason: 1}


@pytest.mark.parametrize(
    ("code", "reason"), [("deadline_exceeded", "REJECTED"), ("client_closed", "CANCELED")]
)
async def test_what_nobody_tells_of_was_lost_on_the_way(metrics, code, reason):
    """It expired in the queue: no worker has seen it."""
    now = asyncio.get_running_loop().time()
    metrics.given_up("bert/1", code, "c1", now + 0.05)
    assert failed(metrics) == {}
    await until(lambda: failed(metrics) == {reason: 1})


async def test_a_late_reply_says_that_a_worker_has_counted(metrics):
    """Another request, given up later and lost, shows that the time has passed."""
    now = asyncio.get_running_loop().time()
    metrics.given_up("bert/1", "deadline_exceeded", "c1", now)
    metrics.stray("late", "c1")
    metrics.given_up("bert/1", "client_closed", "c2", now + 0.01)
    await until(lambda: failed(metrics) == {"CANCELED": 1})


async def test_many_that_are_given_up_are_counted_rather_than_remembered(metrics):
    """A total outage costs a bounded memory, and then some precision."""
    far = asyncio.get_running_loop().time() + 1000
    for n in range(10_003):
        metrics.given_up("bert/1", "deadline_exceeded", f"c{n}", far)
    assert failed(metrics) == {"REJECTED": 3}


def test_a_removed_version_has_no_series(metrics):
    """Nor has a removed model; its neighbours do."""
    for model in ("bert/1", "bert/2", "bertha/1"):
        metrics.refused(model, "unavailable")
    metrics.forget("bert", 1)
    assert failed(metrics) == {"OTHER": 1}
    metrics.forget("bert")
    assert failed(metrics) == {}
    assert failed(metrics, "bertha") == {"OTHER": 1}


async def test_what_another_gateway_removed_has_no_series_either(metrics, tmp_path):
    """The registry's hint is enough to look."""
    repository, state = Repository(str(tmp_path)), MemoryState()
    digest, _ = repository.files.put([torchscript(b"x" * 64)])
    for name in ("bert", "bertha"):
        repository.register(name, None, ModelSpec(), digest)
        metrics.answered(name, "1", "ok", 0.1)
        metrics.refused(f"{name}/1", "unavailable")
    ours, theirs = MemoryStore(state), MemoryStore(state)
    await ours.start()
    await theirs.start()
    catalog = Catalog(repository)
    registry = Registry(repository, catalog, ours, metrics, Tallies(), 1, prune_s=0.01)
    tasks = [
        asyncio.create_task(run()) for run in (registry.follow_changes, registry.prune_metrics)
    ]
    repository.remove("bert")

    async def gone() -> bool:
        await theirs.hint(TOPIC_REGISTRY)
        text = encoder("")[0](metrics.registry).decode()
        return 'model="bert"' not in text

    await until(gone)
    assert failed(metrics, "bertha") == {"OTHER": 1}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
