"""When a worker says that it serves."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from services.worker.http import Readiness, serving
from shared.control import Report


class Broker:
    connected = True


def report(*, engine_up: bool = True) -> Report:
    return Report(
        worker="w",
        incarnation="i",
        seq=1,
        at=0.0,
        device_kind="cpu",
        device_name="CPU",
        budget_bytes=1,
        used_bytes=0,
        measured_bytes=0,
        generation=1,
        engine_up=engine_up,
    )


@pytest.fixture
def clock():
    return [100.0]


@pytest.fixture
def readiness(clock):
    return Readiness(Broker(), ttl_s=3.0, now=lambda: clock[0])


def test_all_must_be_there(readiness, clock):
    """A fresh report, an engine in it, and the broker; what is missing is named."""
    assert readiness.missing() == ["a report to be written", "the engine"]
    readiness.sent(report(engine_up=False))
    assert readiness.missing() == ["the engine"]
    readiness.sent(report())
    assert readiness.missing() == []
    readiness._broker.connected = False
    assert readiness.missing() == ["the message broker"]
    readiness._broker.connected = True
    clock[0] += 3.1
    assert readiness.missing() == ["a report to be written"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_metrics_and_readiness_are_served(readiness, host):
    """On one port, with the reason where it is not ready."""
    registry = CollectorRegistry()
    Gauge("roost_thing", "A thing.", registry=registry)
    with serving(host, 0, registry, readiness) as port:
        url = f"http://127.0.0.1:{port}"
        assert "roost_thing 0.0" in httpx.get(f"{url}/metrics", trust_env=False).text
        waits = httpx.get(f"{url}/readyz", trust_env=False)
        assert waits.status_code == 503
        assert waits.json() == {"status": "waits for a report to be written and the engine"}
        readiness.sent(report())
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
