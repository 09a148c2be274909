"""When a worker says that it serves."""

from __future__ import annotations

import contextlib
import socket
import time

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from services.worker import bounded
from services.worker.http import Readiness, serving
from shared.control import Report

DEADLINE_S = 30.0


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


def _closed_after(connection: socket.socket, drip: bytes) -> bytes:
    """What came until the other side closed it; `drip` is sent now and then meanwhile."""
    connection.settimeout(0.05)
    came, until = b"", time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        with contextlib.suppress(TimeoutError):
            if not (piece := connection.recv(1)):
                return came
            came += piece
        with contextlib.suppress(OSError):
            connection.send(drip)
    raise AssertionError("it was not closed")


@pytest.mark.parametrize("begin", [b"", b"GET /metrics HTTP/1.1\r\nX: "])
def test_a_client_that_drips_its_request_is_cut_off(readiness, monkeypatch, begin):
    """However often it says a byte: it holds a thread."""
    monkeypatch.setattr(bounded, "CONNECTION_S", 0.3)
    with serving("127.0.0.1", 0, CollectorRegistry(), readiness) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.send(begin)
            with contextlib.suppress(ConnectionResetError):
                assert _closed_after(connection, b"y" if begin else b"") == b""
        assert httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 503


def test_a_client_that_does_not_read_is_cut_off(readiness, monkeypatch):
    """One time for the whole answer; the thread is free again."""
    monkeypatch.setattr(bounded, "CONNECTION_S", 0.3)
    monkeypatch.setattr(bounded, "MAX_CONNECTIONS", 1)
    registry = CollectorRegistry()
    Gauge("roost_large", "x" * (16 << 20), registry=registry)
    with (
        serving("127.0.0.1", 0, registry, readiness) as port,
        socket.create_connection(("127.0.0.1", port)) as connection,
    ):
        connection.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        until = time.monotonic() + DEADLINE_S
        while True:  # beside it there is no room, until it is gone
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
                break
            assert time.monotonic() < until


def test_more_connections_than_may_be_are_closed_unheard(readiness, monkeypatch):
    """And one that ends makes room."""
    monkeypatch.setattr(bounded, "MAX_CONNECTIONS", 2)
    with serving("127.0.0.1", 0, CollectorRegistry(), readiness) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as third:
            assert third.recv(1) == b""
        for each in silent:
            each.close()
        until = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
                break
            assert time.monotonic() < until
