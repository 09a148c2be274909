"""`roost up --max-workers`: as many workers as are asked for, and nothing lost on the way."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch

from tests.e2e.running import Up
from tests.e2e.steady import of_x, until


def save_laborious(folder: Path) -> Path:
    """A scripted model that needs some 20 ms for a request, and never batches: x → y = 2·x."""

    class Laborious(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            work = torch.ones([256, 256])
            for _ in range(40):
                work = torch.tanh(work @ work)
            return x * 2.0 + 0.0 * work[0, 0]

    path = folder / "laborious.pt"
    torch.jit.script(Laborious()).save(str(path))
    return path


def test_a_spike_starts_a_worker_and_its_end_lets_one_go(tmp_path):
    """Up at once, down by draining, and every request is answered right: before, during, after."""
    settings = ("SHRINK_AFTER_S=1", "HOLD_DOWN_S=1")
    stack = Up(
        tmp_path / "data", "--max-workers", "2", "--budget", "256MiB", "--device", "cpu",
        *(part for each in settings for part in ("--set", f"ROOST_PLACER_{each}")),
    )  # fmt: skip
    try:
        stack.wait_ready()
        spec = tmp_path / "spec.json"
        spec.write_text(
            json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]})
        )
        stack.roost("push", "laborious", str(save_laborious(tmp_path)), "--manifest", str(spec))
        workers, asked = _spike(stack)
        assert workers[:2] == ["worker-0", "worker-1"]
        assert asked > 24
        gone = ({"worker-0", "worker-1"} - set(_fleet(stack)["workers"])).pop()
        log = (stack.data / "logs" / f"{gone}.log").read_text()
        assert '"drain": true' in log.replace('"drain":true', '"drain": true')
        assert "worker_stopped" in log
        # It was let go, and is not started again.
        assert _fleet(stack)["workers"] == [({"worker-0", "worker-1"} - {gone}).pop()]
    finally:
        assert stack.stop() == 0


def _spike(stack: Up) -> tuple[list[str], int]:
    """Asks more than one worker can do until there are two, then little until one is gone.
    Returns the workers that were seen, and how many requests were answered."""
    many, stop = threading.Event(), threading.Event()
    many.set()
    answered: list[int] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=stack.url, timeout=30, trust_env=False) as http:
            while not stop.is_set():
                if number and not many.wait(0.1):
                    continue
                reply = http.post("/v2/models/laborious/infer", content=of_x())
                assert reply.status_code == 200, reply.text
                assert reply.json()["outputs"][0]["data"] == [2, 4, 6]
                answered.append(number)
                stop.wait(0.0 if many.is_set() else 0.2)

    seen: list[str] = []

    def workers() -> int:
        found = _fleet(stack)
        seen.extend(name for name in found["workers"] if name not in seen)
        return len(found["workers"]) + len(found["leaving"]) + len(found["ending"])

    with ThreadPoolExecutor(24) as pool:
        asking = [pool.submit(ask, number) for number in range(24)]
        try:
            until(lambda: workers() == 2, "a second worker", 40)
            many.clear()
            until(lambda: workers() == 1, "one is gone", 40)
        finally:
            stop.set()
        for each in asking:
            each.result()
    return seen, len(answered)


def _fleet(stack: Up) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(
        f"{stack.endpoints['placer']}/fleet/workers-wanted", trust_env=False
    ).json()
    return found
