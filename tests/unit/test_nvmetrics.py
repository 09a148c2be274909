"""Triton's metric names, as a scrape finds them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from shared.nvmetrics import Failures, Inferences, encoder, reason_of

# What tritonserver 2.50 (24.09) tells of a model that it has loaded and that nobody has asked.
TRITON = {
    ("nv_inference_request_success", "counter"),
    ("nv_inference_request_failure", "counter"),
    ("nv_inference_count", "counter"),
    ("nv_inference_exec_count", "counter"),
    ("nv_inference_request_duration_us", "counter"),
    ("nv_inference_queue_duration_us", "counter"),
    ("nv_inference_compute_input_duration_us", "counter"),
    ("nv_inference_compute_infer_duration_us", "counter"),
    ("nv_inference_compute_output_duration_us", "counter"),
    ("nv_inference_pending_request_count", "gauge"),
    ("nv_model_load_duration_secs", "gauge"),
}
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def scraped(collector, accept: str = "") -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return encoder(accept)[0](registry).decode()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """By name as it stands in the text, and by the labels' values in the order of their names."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels, _, value = rest.rpartition("} ")
            values = [pair.partition("=")[2].strip('"') for pair in labels.split(",")]
            found[name, *values] = float(value)
    return found


@pytest.fixture
def counted():
    """One batch of two requests that were answered, one that failed, one that waits."""
    counts = Inferences()
    counts.loaded("bert/3", 1.5)
    counts.ran("bert/3")
    counts.succeeded("bert/3", 2, request_s=0.010, queue_s=0.004, infer_s=0.005)
    counts.succeeded("bert/3", 1, request_s=0.011, queue_s=0.005, infer_s=0.005)
    counts.failed("bert/3", "BACKEND")
    counts.pending = {"bert/3": 1}
    return counts


def test_names_and_kinds_are_tritons(counted):
    """Counters have no `_total`, in their samples as little as in their TYPE lines."""
    text = scraped(counted)
    lines = [line.split() for line in text.splitlines() if line.startswith("# TYPE ")]
    assert {(name, kind) for _, _, name, kind in lines} == TRITON
    assert {name for name, *_ in samples(text)} == {name for name, _ in TRITON}
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families.keys() == {name for name, _ in TRITON}
    assert {(family.name, family.type) for family in families.values()} == TRITON


def test_values_are_those_of_triton_s_definitions(counted):
    """Requests, rows and batches are three counts; each request counts its batch's whole time."""
    found = samples(scraped(counted))
    of = ("bert", "3")
    assert found["nv_inference_request_success", *of] == 2
    assert found["nv_inference_count", *of] == 3
    assert found["nv_inference_exec_count", *of] == 1
    assert found["nv_inference_request_duration_us", *of] == 21_000
    assert found["nv_inference_queue_duration_us", *of] == 9_000
    assert found["nv_inference_compute_infer_duration_us", *of] == 10_000
    assert found["nv_inference_compute_input_duration_us", *of] == 0
    assert found["nv_inference_pending_request_count", *of] == 1
    assert found["nv_model_load_duration_secs", *of] == 1.5


def test_failures_have_every_reason_from_the_begin(counted):
    """Also those that did not occur: an alert on a rate needs the zero before."""
    found = samples(scraped(counted))
    failed = {key[2]: value for key, value in found.items() if key[0].endswith("_failure")}
    assert failed == {"REJECTED": 0, "CANCELED": 0, "BACKEND": 1, "OTHER": 0}


def test_the_same_names_come_as_openmetrics(counted):
    """Which has no counters without `_total`: what it would refuse is of unknown kind there."""
    text = scraped(counted, OPENMETRICS)
    families = {family.name: family.type for family in parse_openmetrics(text)}
    kinds = {"counter": "unknown", "gauge": "gauge"}
    assert families == {name: kinds[kind] for name, kind in TRITON}
    found = samples(text.removesuffix("# EOF\n"))
    assert found["nv_inference_request_success", "bert", "3"] == 2


def test_our_own_counters_stay_as_they_are():
    """With `_total`, in both formats."""
    registry = CollectorRegistry()
    registry.register(Failures())
    Counter("roost_things", "Things.", registry=registry).inc()
    for accept in ("", OPENMETRICS):
        assert "roost_things_total 1.0" in encoder(accept)[0](registry).decode()


def test_what_is_forgotten_has_no_series(counted):
    """And a version that stays keeps its own."""
    counted.failed("bert/4", "OTHER")
    assert sorted(counted.of_name("bert")) == ["bert/3", "bert/4"]
    counted.forget(["bert/3"])
    assert {key[-1] for key in samples(scraped(counted))} == {"4"}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("deadline_exceeded", "REJECTED"),
        ("client_closed", "CANCELED"),
        ("model_failed", "BACKEND"),
        ("quarantined", "BACKEND"),
        ("invalid_argument", "OTHER"),
        ("something new", "OTHER"),
    ],
)
def test_every_code_has_one_of_triton_s_reasons(code, reason):
    """Codes that a later version brings too."""
    assert reason_of(code) == reason
