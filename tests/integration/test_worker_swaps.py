"""A worker that serves more models than its device holds."""

from __future__ import annotations

import random

import httpx
import numpy as np
import pytest

from roost.local.ports import free_ports
from shared.names import ModelId
from tests.integration.test_worker import SPEC, Stage, output, until, working
from tests.torchscript_files import weights


def register(stage: Stage, name: str, floats: int = 256) -> ModelId:
    content = np.full(floats, hash(name) % 1000, np.float32).tobytes()
    digest, _ = stage.repository.files.put([weights(w=content)])
    return stage.repository.register(name, 1, SPEC, digest).id


async def test_models_beyond_the_device_are_bound_and_swapped_in(tmp_path):
    """Six models on a device for two: all are bound at once, all are answered, whatever the
    order; only the first loads read the disk, and the metrics tell."""
    (port,) = free_ports(1)
    async with working(tmp_path, 5000, host_bytes="1MiB", metrics_port=port) as stage:
        models = [register(stage, f"m{n}") for n in range(6)]
        await stage.bound(*models)
        report = stage.report()
        assert report.host_budget_bytes == 1 << 20
        assert report.host_used_bytes == 6 * 1024
        assert {m.tier for m in report.models} == {"device", "host"}
        assert all(m.phase == "ready" for m in report.models)
        order = models * 4
        random.Random(3).shuffle(order)
        for n, model in enumerate(order):
            assert output(await stage.ask(model, [[n, 1]])) == [[2 * n, 2]]
        sent = [(n, await stage.send(order[n], [[n, 2]])) for n in range(24)]
        for n, correlation in sent:
            assert output(await stage.reply(correlation)) == [[2 * n, 4]]
        assert stage.engine.host_evictions == []
        assert stage.report().used_bytes <= 5000
        async with httpx.AsyncClient(trust_env=False) as client:
            told = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        counted = "roost_worker_load_seconds_count"
        lines = dict(line.rsplit(" ", 1) for line in told.splitlines() if line[:1] != "#")
        assert float(lines["roost_worker_host_used_bytes"]) == 6 * 1024
        assert float(lines["roost_worker_host_measured_bytes"]) > 0
        loads = {
            source: sum(
                float(lines.get(f'{counted}{{source="{source}",tier="{tier}"}}', 0))
                for tier in ("device", "host")
            )
            for source in ("disk", "host")
        }
        assert loads["disk"] == 6, "each was read once"
        assert loads["host"] > 4
        assert float(lines['roost_worker_evictions_total{tier="device"}']) > 4
        held = [
            float(lines[f'roost_worker_models{{tier="{tier}"}}']) for tier in ("device", "host")
        ]
        assert sum(held) == 6


async def test_after_an_engine_is_lost_all_are_served_again(tmp_path):
    """Both tiers went with it; what waited comes first."""
    async with working(tmp_path, 5000, host_bytes="1MiB") as stage:
        models = [register(stage, f"m{n}") for n in range(5)]
        await stage.bound(*models)
        stage.engine.life.kill()
        sent = [await stage.send(model, [[1, 2]]) for model in models]
        for correlation in sent:
            assert output(await stage.reply(correlation)) == [[2, 4]]
        assert len(stage.engine.lives) == 2
        await until(lambda: all(m.bound for m in stage.models()))


async def test_a_model_that_fails_to_come_is_reported_and_the_others_serve(tmp_path):
    """What waited for it goes back to its queue."""
    async with working(tmp_path, 5000, host_bytes="1MiB") as stage:
        models = [register(stage, name) for name in ("a", "b", "broken", "c")]
        await stage.assign(*models)
        good = [model for model in models if model != "broken/1"]
        await until(lambda: sum(m.bound for m in stage.models()) >= 3)
        for model in good * 2:
            assert output(await stage.ask(model, [[1, 2]])) == [[2, 4]]


@pytest.mark.torch
async def test_the_real_engine_swaps_and_gives_the_right_answers(tmp_path):
    """Eight fine-tunes on a device for two and a half, each with its own answers; the bytes on
    the device stay within the budget by the engine's own word."""
    torch = pytest.importorskip("torch")
    size = 1 << 10

    class Net(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.inner = torch.nn.Linear(2, size)
            self.deep = torch.nn.Linear(size, size)
            self.outer = torch.nn.Linear(size, 2)

        def forward(self, x):
            return self.outer(torch.relu(self.deep(self.inner(x))))

    async with working(tmp_path, 12 << 20, real=True, host_bytes="64MiB") as stage:
        models, nets = [], []
        for n in range(8):
            net = Net(n).eval()
            torch.jit.script(net).save(tmp_path / "net.pt")
            digest, _ = stage.repository.files.put([(tmp_path / "net.pt").read_bytes()])
            models.append(stage.repository.register(f"net{n}", 1, SPEC, digest).id)
            nets.append(net)
        await stage.bound(*models)
        order = [*range(8)] * 5
        random.Random(1).shuffle(order)
        for burst in (order[:20], order[20:]):
            sent = [(n, x, await stage.send(models[n], [[x, n]])) for x, n in enumerate(burst)]
            for n, x, correlation in sent:
                with torch.inference_mode():
                    expected = nets[n](torch.tensor([[float(x), float(n)]])).numpy()
                answer = output(await stage.reply(correlation))
                assert np.allclose(answer, expected, rtol=1e-4, atol=1e-5)
        # All of it may take less time than passes between two reports.
        await until(lambda: any(m.tier == "host" and m.load_seconds for m in stage.models()))
        report = stage.report()
        assert report.used_bytes <= report.budget_bytes
        assert report.host_used_bytes >= 8 * 4 * size * size
        assert report.engine_restarts == 0
