"""A model that keeps a core busy, and more requests for it than one worker can answer in time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch

from tests.e2e.steady import of_x, until

SPEC = '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]}'


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


def ask_laborious(http: httpx.Client) -> None:
    """Fails unless it answers right."""
    reply = http.post("/v2/models/laborious/infer", content=of_x())
    assert reply.status_code == 200, reply.text
    assert reply.json()["outputs"][0]["data"] == [2, 4, 6]


def spike(url: str, placer_url: str, limit_s: float = 40.0) -> tuple[list[str], int]:
    """Asks more than one worker can do until there are two, then little until one is gone; each
    within `limit_s`. Returns the workers that were seen, and how many requests were answered."""
    many, stop = threading.Event(), threading.Event()
    many.set()
    answered: list[int] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            while not stop.is_set():
                if number and not many.wait(0.1):
                    continue
                ask_laborious(http)
                answered.append(number)
                stop.wait(0.0 if many.is_set() else 0.2)

    seen: list[str] = []

    def workers() -> int:
        found = fleet(placer_url)
        seen.extend(name for name in found["workers"] if name not in seen)
        return len(found["workers"]) + len(found["leaving"]) + len(found["ending"])

    with ThreadPoolExecutor(24) as pool:
        asking = [pool.submit(ask, number) for number in range(24)]
        try:
            until(lambda: workers() == 2, "a second worker", limit_s)
            many.clear()
            until(lambda: workers() == 1, "one is gone", limit_s)
        finally:
            stop.set()
        for each in asking:
            each.result()
    return seen, len(answered)


def fleet(placer_url: str) -> dict[str, Any]:
    """What the placer says of its workers. A 503 is no answer yet: for the first seconds of its
    term, a placer does not know whether it has heard every worker."""
    answers: list[httpx.Response] = []

    def answered() -> bool:
        answers.append(httpx.get(f"{placer_url}/fleet/workers-wanted", trust_env=False))
        return answers[-1].status_code != 503

    until(answered, "the placer knows its workers")
    found: dict[str, Any] = answers[-1].raise_for_status().json()
    return found
