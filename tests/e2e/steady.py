"""Whether a running stack is as it was before: what bad input must not change."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.running import Up

X = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2.0, 3.0]}
"""The input of a good request to `doubler`."""


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    """A request in JSON."""
    return json.dumps({"inputs": list(inputs), **more}).encode()


def of_x(**over: Any) -> bytes:
    """A request with one input, which differs from the good one in this."""
    return body({**X, **over})


def answers(http: httpx.Client) -> None:
    """Fails unless `doubler` answers."""
    reply = http.post("/v2/models/doubler/infer", content=body(X))
    assert reply.status_code == 200, reply.text
    assert reply.json()["outputs"][0]["data"] == [2, 4, 6]


def seats(up: Up) -> list[dict[str, Any]]:
    """Every model on every worker, as the placer sees it."""
    return [seat for worker in _workers(up) for seat in worker["models"]]


def holds_nothing(up: Up) -> bool:
    return not any(seat["held"] for seat in seats(up))


def signs(up: Up) -> dict[str, Any]:
    """What changes when something is restarted, reconnects, or fails on what it did not expect."""
    services = {}
    for pid in up.children():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except FileNotFoundError:
            continue  # one of the broker's own helpers, gone meanwhile
        if found := re.search(r"services\.[\w.]+", command.replace(b"\0", b" ").decode()):
            services[pid] = found[0]
    assert {"services.gateway", "services.placer", "services.worker"} <= set(services.values())
    logs = [log.read_text(errors="replace") for log in (up.data / "logs").glob("*.log")]
    assert logs
    return {
        "processes": services,
        "connections lost": sum(log.count("lost the connection") for log in logs),
        "errors": sum(len(re.findall(r'"level": ?"(?:error|critical)"', log)) for log in logs),
        "engines": {w["worker"]: (w["engine_up"], w["engine_restarts"]) for w in _workers(up)},
    }


def counted(url: str, name: str, **labels: str) -> float:
    """The sum of a counter's samples that carry these labels."""
    total = 0.0
    for line in httpx.get(f"{url}/metrics", trust_env=False).text.splitlines():
        if re.match(rf"{name}[{{ ]", line) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rpartition(" ")[2])
    return total


def until(condition: Callable[[], object], what: str, limit_s: float = 15.0) -> None:
    """Polls until it holds; fails when it does not in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.05)


def _workers(up: Up) -> list[dict[str, Any]]:
    answer = httpx.get(f"{up.endpoints['placer']}/fleet", trust_env=False)
    return list(answer.raise_for_status().json()["workers"])
