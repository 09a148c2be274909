"""What a worker counts by model, and for how long."""

from __future__ import annotations

import pytest

from services.worker.core.events import Item
from services.worker.metrics import Metrics, Waiting
from shared.control import ModelReport
from shared.models import Footprint
from shared.nvmetrics import encoder


@pytest.fixture
def clock():
    return [1000.0]


@pytest.fixture
def metrics(clock):
    return Metrics("w0", clock=lambda: clock[0])


def report(model: str, **over) -> ModelReport:
    fields = {"tier": "device", "phase": "ready", "bound": True, "footprint": Footprint(640)}
    return ModelReport(model=model, **(fields | over))


def scraped(metrics: Metrics) -> dict[str, float]:
    lines = encoder("")[0](metrics.registry).decode().splitlines()
    told = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in told}


def answered(metrics: Metrics, model: str, rows: int = 1) -> None:
    item = Item(item=1, model=model, subscription=1, rows=rows, arrived=990.0)
    metrics.answered(item, queue_s=4.0, compute_s=1.0, now=996.0, late=False)


def test_every_end_of_a_request_counts_under_both_names(metrics):
    """Ours with the code, Triton's with its reason; what a client that hung up had asked is
    cancelled there, whatever it was refused with."""
    metrics.hung_up = lambda id_: id_ == "gone"
    answered(metrics, "a/1", rows=3)
    metrics.refused("a/1", "deadline_exceeded", "c1", late=True)
    metrics.refused("a/1", "deadline_exceeded", "gone", late=False)
    metrics.refused("a/1", "model_failed", "c2", late=False)
    found = scraped(metrics)
    of = 'model="a",version="1"'
    assert found[f'roost_worker_requests_total{{code="ok",{of}}}'] == 1
    assert found[f'roost_worker_requests_total{{code="deadline_exceeded",{of}}}'] == 2
    assert found["roost_worker_late_replies_total"] == 1
    assert found[f"nv_inference_request_success{{{of}}}"] == 1
    assert found[f"nv_inference_count{{{of}}}"] == 3
    assert found[f"nv_inference_request_duration_us{{{of}}}"] == 6e6
    assert found[f"nv_inference_queue_duration_us{{{of}}}"] == 4e6
    failed = {
        reason: found[f'nv_inference_request_failure{{model="a",reason="{reason}",version="1"}}']
        for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER")
    }
    assert failed == {"REJECTED": 1, "CANCELED": 1, "BACKEND": 1, "OTHER": 0}


def test_ages_grow_between_reports(metrics, clock):
    """They are made at the scrape: a worker whose loop hangs does not look young."""
    metrics.seen((report("a/1", held=5), report("b/2")), {"a/1": Waiting(3, 998.5)})
    clock[0] += 10
    found = scraped(metrics)
    assert found['roost_worker_oldest_request_seconds{model="a",version="1"}'] == 11.5
    assert found['roost_worker_oldest_request_seconds{model="b",version="2"}'] == 0
    assert found['roost_worker_waiting_requests{model="a",version="1"}'] == 3
    assert found['roost_worker_held_requests{model="a",version="1"}'] == 5
    assert found['roost_worker_model_bytes{model="b",tier="device",version="2"}'] == 640


def test_what_waits_is_pending_for_triton(metrics):
    """Of every model that has series, none being 0."""
    metrics.inferences.loaded("a/1", 0.1)
    metrics.inferences.loaded("b/1", 0.1)
    metrics.seen((report("a/1"), report("b/1")), {"a/1": Waiting(3, 998.5)})
    found = scraped(metrics)
    assert found['nv_inference_pending_request_count{model="a",version="1"}'] == 3
    assert found['nv_inference_pending_request_count{model="b",version="1"}'] == 0


def test_series_of_a_model_that_left_go_once_they_were_scraped(metrics, clock):
    """Not at once, or what it did last would never be seen; and not if it came back."""
    for model in ("a/1", "b/1"):
        answered(metrics, model)
        metrics.refused(model, "model_failed", None, late=False)
        metrics.gone(model)
    metrics.seen((), {})
    assert any('model="a"' in name for name in scraped(metrics))
    clock[0] += 299
    metrics.seen((report("b/1"),), {})
    clock[0] += 2
    metrics.seen((report("b/1"),), {})
    names = scraped(metrics)
    assert not any('model="a"' in name for name in names)
    assert 'roost_worker_requests_total{code="ok",model="b",version="1"}' in names
    metrics.refused("a/1", "model_failed", None, late=False)  # it begins anew
    assert (
        scraped(metrics)['roost_worker_requests_total{code="model_failed",model="a",version="1"}']
        == 1
    )
