"""The engine on a real device. What it shares with the CPU is tested there."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from services.worker.wire import BatchRan, EngineFailed, ModelLoaded, WarmUp  # noqa: E402
from tests.unit.engine import engine_models as models  # noqa: E402
from tests.unit.engine.engine_harness import EngineProcess, spec  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(scope="module")
def engine():
    with EngineProcess(device="cuda:0", budget_bytes=1 << 30) as engine:
        started = engine.started()
        assert started.device_kind.startswith("cuda:")
        assert started.device_uuid.startswith(("GPU-", "MIG-"))
        assert 0 < started.base_bytes < started.capacity_bytes
        yield engine


def load(engine, module, path, **options) -> ModelLoaded:
    event = engine.load("m/1", models.save(module, path / "m.pt"), **options)
    assert isinstance(event, ModelLoaded), event
    return event


def test_a_batch_runs_on_the_device(engine, tmp_path):
    """Inputs go to the device and outputs come back, from the dispatch thread's stream."""
    event = load(
        engine,
        models.Linear(),
        tmp_path,
        warm=(WarmUp(1), WarmUp(64)),
        inputs=(spec("x", "FP32", 4),),
        max_batch_size=64,
    )
    assert event.weights_bytes == 1024  # two storages of whole 512 bytes
    assert event.cases[-1].workspace_bytes > 0
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    for _ in range(3):
        outputs = engine.run("m/1", {"x": x}, rows=2)
        np.testing.assert_allclose(outputs["OUTPUT__0"], [[13.0] * 3, [45.0] * 3])
    engine.evict("m/1")


def test_eviction_gives_device_memory_back(engine, tmp_path):
    """After an eviction the allocator holds no more than before the load."""
    before = engine.used_bytes()
    for _ in range(5):
        load(engine, models.Weights(100), tmp_path)
        assert engine.used_bytes() - before >= 100 << 20
        engine.evict("m/1")
        assert engine.used_bytes() - before < 32 << 20


def test_models_of_one_architecture_are_swapped(tmp_path):
    """By copies from the host's memory, with the answers of a plain load; and when all are gone
    so are their bytes."""
    ids = np.arange(40).reshape(4, 10)
    made = {}
    for n in range(3):
        path = models.save(models.Net(n), tmp_path / f"{n}.pt")
        on_device = models.answer(path, torch.from_numpy(ids).cuda(), device="cuda")
        made[f"net/{n + 1}"] = (
            {"path": path, "layout": models.layout_of(path)},
            on_device.cpu().numpy().tobytes(),
        )
    with EngineProcess(device="cuda:0", budget_bytes=1 << 30, host_bytes=256 << 20) as engine:
        engine.started()
        before = engine.used_bytes()
        for name, (file, _) in made.items():
            assert isinstance(engine.hold(name, **file), ModelLoaded)
        for _ in range(5):
            for name, (file, expected) in made.items():
                event = engine.load(name, **file, keep_host=True)
                assert isinstance(event, ModelLoaded), event
                assert event.source == "host"
                for _ in range(2):
                    outputs = engine.run(name, {"ids": ids})
                    assert outputs["OUTPUT__0"].tobytes() == expected
            for name in made:
                engine.evict(name)
        taken = engine.used_bytes() - before - engine.memory.spare_bytes
        assert taken < 32 << 20


def test_running_out_of_device_memory_costs_one_batch(engine, tmp_path):
    """Beyond the budget torch raises, the batch fails as exhausted, and the next one runs."""
    load(engine, models.Big(), tmp_path)
    failed = engine.refused("m/1", {"x": np.ones(1, np.float32), "count": [1 << 31]})
    assert failed.code == "resource_exhausted"
    engine.submit("m/1", {"x": np.ones(1, np.float32), "count": [1 << 20]})
    event = engine.answer()
    assert isinstance(event, BatchRan)
    assert 4 << 20 <= event.workspace_bytes < 64 << 20
    engine.outputs(event)
    engine.evict("m/1")


def test_a_lost_context_ends_the_engine(tmp_path):
    """An index beyond an embedding kills the device's context: the engine says so and ends."""
    with EngineProcess(device="cuda:0", budget_bytes=1 << 30) as engine:
        engine.started()
        load(engine, models.Embedding(), tmp_path)
        engine.run("m/1", {"ids": np.array([1])})
        engine.submit("m/1", {"ids": np.array([10_000_000])})
        event = engine.event()
        assert isinstance(event, EngineFailed), event
        assert "CUDA error" in event.message
        assert engine.exit_code() == 70
