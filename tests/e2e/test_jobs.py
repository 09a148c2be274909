"""Jobs of a real worker, across a restart of the whole stack."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import Up, save_doubler

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]


def submit(http: httpx.Client, number: int) -> str:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [float(number), 1.0]}
    answer = http.post("/v2/models/doubler/jobs", json={"inputs": [tensor]})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def wait_for(http: httpx.Client, job: str, limit_s: float = 120) -> dict:
    deadline = time.monotonic() + limit_s
    while True:
        told = http.get(f"/v2/jobs/{job}").json()
        if told["state"] != "queued":
            return told
        assert time.monotonic() < deadline, told
        time.sleep(0.1)


def test_jobs_survive_a_restart_of_the_whole_stack(tmp_path: Path) -> None:
    """Gateway, placer, worker, broker and Redis are stopped while all jobs wait, and started
    again: every job gets its right answer."""
    model = save_doubler(tmp_path)
    first = Up(tmp_path / "data", "--set", "ROOST_GATEWAY_JOB_PREFETCH=0")
    try:
        first.wait_ready()
        first.roost("push", "doubler", str(model))
        with httpx.Client(base_url=first.url, timeout=60, trust_env=False) as http:
            jobs = [submit(http, number) for number in range(20)]
    finally:
        first.stop()
    second = Up(tmp_path / "data")
    try:
        second.wait_ready()
        with httpx.Client(base_url=second.url, timeout=60, trust_env=False) as http:
            for number, job in enumerate(jobs):
                assert wait_for(http, job)["state"] == "succeeded"
                result = http.get(f"/v2/jobs/{job}/result").json()
                assert result["outputs"][0]["data"] == [2.0 * number, 2.0]
    finally:
        assert second.stop() == 0
