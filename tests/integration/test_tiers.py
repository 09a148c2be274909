"""More models than a device holds, through gateway, placer, worker and a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from roost.client import AsyncRoostClient
from roost.stack.embedded import EmbeddedStack
from roost.stack.port import StackConfig
from shared.models import ModelSpec, TensorSpec
from shared.repository import Repository

pytestmark = pytest.mark.torch
MB = 1 << 20
SPEC = ModelSpec(
    inputs=(TensorSpec("x", "FP32", (4,)),),
    outputs=(TensorSpec("y", "FP32", (4,)),),
    max_batch_size=8,
)


class Part(torch.nn.Module):
    """`megabytes` of weights, all of one value."""

    def __init__(self, megabytes: int, value: float) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((megabytes * MB // 4,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w[-4:]


class Net(torch.nn.Module):
    """y = backbone · head · x"""

    def __init__(self, backbone: Part, head: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Part(1, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.backbone(x))
        return result


def register(root: Path, name: str, net: Net) -> None:
    path = root / f"{name}.pt"
    torch.jit.script(net).save(str(path))
    repository = Repository(str(root / "repository"))
    repository.register(name, 1, SPEC, repository.files.put([path.read_bytes()])[0])


@asynccontextmanager
async def stack(root: Path, budget: int, host: int) -> AsyncIterator[EmbeddedStack]:
    """One worker with a CPU as its device."""
    running = EmbeddedStack(
        StackConfig(
            data_dir=root,
            budget_bytes=budget,
            device="cpu",
            settings={"ROOST_WORKER_HOST_BYTES": str(host)},
        )
    )
    try:
        await running.start()
        yield running
    finally:
        await running.close()


async def ask_all(running: EmbeddedStack, factors: dict[str, float], rounds: int) -> None:
    """Asks every model at once, and again; each answer must be the model's own."""
    async with AsyncRoostClient(running.gateway_url) as client:

        async def ask(name: str, row: int) -> None:
            x = np.full((1, 4), row + 1, np.float32)
            outputs = await client.infer(name, {"x": x}, timeout_s=60)
            np.testing.assert_array_equal(outputs["y"], x * factors[name])

        for row in range(rounds):
            await asyncio.gather(*(ask(name, row) for name in factors))


async def told(running: EmbeddedStack) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The worker as the placer tells of it, and the gateway's index by name."""
    async with httpx.AsyncClient(trust_env=False) as http:
        fleet = (await http.get(f"{running.placer_url}/fleet")).json()
    async with AsyncRoostClient(running.gateway_url) as client:
        index = {item["name"]: item for item in await client.list()}
    (worker,) = fleet["workers"]
    return worker, index


async def settled(
    running: EmbeddedStack, tiers: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What is told once the models are in these tiers, in any order; the last word if they do
    not come there."""
    async with asyncio.timeout(20):
        while True:
            worker, index = await told(running)
            placer = sorted(model["tier"] for model in worker["models"])
            gateway = sorted(tier for item in index.values() for tier in item["tiers"].values())
            if placer == gateway == tiers:
                return worker, index
            await asyncio.sleep(0.1)


async def test_six_models_are_served_by_a_device_with_room_for_two(tmp_path):
    """All are asked at once: all are answered right, none is refused, and people are told which
    is where."""
    factors = {f"m{n}": (n + 1.0) * (n + 2.0) for n in range(6)}
    for n, name in enumerate(factors):
        register(tmp_path, name, Net(Part(3, n + 1.0), n + 2.0))
    async with stack(tmp_path, 10 * MB, 64 * MB) as running:
        await ask_all(running, factors, rounds=4)
        worker, index = await settled(running, ["device"] * 2 + ["host"] * 4)
        assert {item["state"] for item in index.values()} == {"READY"}
        assert {model["phase"] for model in worker["models"]} == {"ready"}
        assert all(model["assigned"] and model["bound"] for model in worker["models"])
        assert not any(model["error"] for model in worker["models"])
        assert worker["used_bytes"] <= worker["budget_bytes"] == 10 * MB
        assert worker["engine_restarts"] == 0


async def test_fine_tunes_of_one_backbone_share_a_device(tmp_path):
    """Twelve that would take six times what the device has are all on it, from the first request
    on: nothing is evicted for them, and nobody is refused."""
    factors = {f"t{n}": 2.0 * (n + 1) for n in range(12)}
    for n, name in enumerate(factors):
        register(tmp_path, name, Net(Part(9, 2.0), n + 1.0))
    async with stack(tmp_path, 24 * MB, 0) as running:
        await ask_all(running, factors, rounds=2)
        worker, index = await settled(running, ["device"] * 12)
        assert sum(model["bytes"] for model in worker["models"]) == 120 * MB
        assert 21 * MB <= worker["used_bytes"] <= 24 * MB
        assert {model["shared_bytes"] for model in worker["models"]} <= {9 * MB, 10 * MB}
        assert all(item["shared_bytes"] >= 9 * MB for item in index.values())
        async with httpx.AsyncClient(trust_env=False) as http:
            fleet = (await http.get(f"{running.placer_url}/fleet")).json()
        happened = {event["what"] for event in fleet["events"]}
        assert not happened & {"unassigned", "refused", "retired"}, fleet["events"]
