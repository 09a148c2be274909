"""Batches that come, compute and leave at the same time on a real device."""

from __future__ import annotations

import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from services.worker.wire import BatchRan, ModelLoaded, Release, RunBatch, TensorRef  # noqa: E402
from tests.unit.engine import engine_models as models  # noqa: E402
from tests.unit.engine.engine_harness import EngineProcess, spec  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

MIB = 1 << 20


class State(torch.nn.Module):
    """Returns the very tensor that it writes to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += x
        return self.n


@pytest.fixture(scope="module")
def engine():
    with EngineProcess(
        device="cuda:0", budget_bytes=4 << 30, inbox_bytes=256 * MIB, outbox_bytes=256 * MIB
    ) as engine:
        engine.started()
        assert "could not be pinned" not in engine.errors()
        yield engine


def load(engine, module, path, **options) -> None:
    event = engine.load("m/1", models.save(module, path / "m.pt"), **options)
    assert isinstance(event, ModelLoaded), event


def answered(engine) -> BatchRan:
    event = engine.answer()
    assert isinstance(event, BatchRan), event
    return event


def test_no_batch_sees_another_one_s_bytes(engine, tmp_path):
    """Of many under way at once, of several sizes, each gets the outputs of its own inputs."""
    load(engine, models.Linear(), tmp_path, inputs=(spec("x", "FP32", 4),), max_batch_size=65536)
    expected: dict[int, np.ndarray] = {}
    for number in range(300):
        if len(expected) == 6:
            check_linear(engine, expected)
        x = np.full((1 + number * 37 % 5000, 4), number, np.float32)
        expected[engine.submit("m/1", {"x": x}, rows=len(x))] = x
    while expected:
        check_linear(engine, expected)
    engine.evict("m/1")


def check_linear(engine, expected) -> None:
    event = answered(engine)
    x = expected.pop(event.batch)
    reference = torch.jit.script(models.Linear())(torch.from_numpy(x)).detach().numpy()
    (output,) = engine.outputs(event).values()
    got = np.frombuffer(output.data, np.float32).reshape(output.shape)
    np.testing.assert_allclose(got, reference, rtol=1e-2)


def test_what_a_model_writes_to_leaves_before_it_writes_again(engine, tmp_path):
    """A model that returns its own state: each batch gets the state as it was then."""
    load(engine, State(), tmp_path, inputs=(spec("x", "FP32", 1),))
    for _ in range(8):
        engine.submit("m/1", {"x": np.ones(1, np.float32)})
    seen = []
    for _ in range(8):
        (output,) = engine.outputs(answered(engine)).values()
        seen.append(np.frombuffer(output.data, np.float32)[0])
    assert seen == list(range(1, 9))
    engine.evict("m/1")


def test_copies_overlap(engine, tmp_path):
    """Inputs of one batch arrive while the outputs of another leave: the device is done sooner
    than the sum of what the batches tell."""
    load(engine, models.Identity(), tmp_path)
    size = 64 * MIB
    refs = (TensorRef("x", "FP32", (size // 4,), 0, size),)
    batches, told = 40, 0.0
    for number in range(4):
        engine.send(RunBatch(number, "m/1", 1, refs))
    started = time.perf_counter()
    for number in range(batches):
        event = answered(engine)
        told += event.compute_s
        engine.send(Release((event.batch,)))
        if number + 4 < batches:
            engine.send(RunBatch(number + 4, "m/1", 1, refs))
    assert time.perf_counter() - started < 0.85 * told
    engine.evict("m/1")
