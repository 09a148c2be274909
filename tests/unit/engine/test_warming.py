from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.memory import open_device  # noqa: E402
from services.worker.engine.unrest import Unrest  # noqa: E402
from services.worker.engine.warming import Warmer, asked, zero_inputs  # noqa: E402
from services.worker.wire import WarmUp  # noqa: E402
from shared.models import Manifest, Padding, TensorSpec  # noqa: E402

pytestmark = pytest.mark.torch

IDS = TensorSpec("ids", "INT64", (-1,))
HINT = TensorSpec("hint", "FP32", (3,), optional=True)


def manifest(**spec) -> Manifest:
    return Manifest(name="m", version=1, digest="", size_bytes=0, created_at=0.0, **spec)


class Runs:
    """A dispatcher that runs what it is given at once, and a model that only counts."""

    def __init__(self, on_run=lambda: None):
        self.unrest = Unrest()
        self.calls = 0
        self.shapes = []
        self._on_run = on_run

    def call(self, function):
        self.calls += 1
        return function()

    def outputs_of(self, executor, of, inputs, rows):
        self.shapes.append(tuple(inputs[0][1].shape))
        self._on_run()
        return []


class Model:
    """An executor that tells how it was run, and fails as it is told."""

    def __init__(self, runs, error=None):
        self.called = []
        self._runs = runs
        self._error = error

    def run(self, inputs):
        alone = self._runs.calls == 0 and self._runs.unrest.quiet() is None
        self.called.append((tuple(inputs[0][1].shape), alone, torch.is_inference_mode_enabled()))
        if self._error is not None:
            raise self._error


def warm_up(device, runs, model, batches, executor=None, *, fresh=False):
    return Warmer(device, runs).warm_up(executor, model, asked(model, batches), fresh=fresh)


@pytest.fixture
def device():
    return open_device("cpu", 0)


def test_the_padded_dimension_is_filled_up():
    """A warm-up of a size has that size where requests of different lengths would differ; what
    a request may leave out is left out."""
    padded = manifest(
        inputs=(IDS, HINT), max_batch_size=8, padding=Padding(inputs={"ids": 0}, sizes=(32, 64))
    )
    ((name, value),) = zero_inputs(padded, WarmUp(2, 64))
    assert (name, tuple(value.shape)) == ("ids", (2, 64))
    ((_, value),) = zero_inputs(padded, WarmUp(2))
    assert tuple(value.shape) == (2, 16)


def test_only_known_inputs_without_a_state_are_warmed():
    """Nobody can guess inputs, and zeros would change a state."""
    batches = [WarmUp(1)]
    assert asked(manifest(inputs=(IDS,)), batches)
    assert not asked(manifest(), batches)
    assert not asked(manifest(inputs=(IDS,), stateful=True), batches)


def test_what_is_the_same_work_has_the_same_key():
    """Of two models of one program: the same inputs in the same rows and sizes, whatever the
    rest of their manifests says."""

    def keys(batches, **spec):
        return set(asked(manifest(**spec), batches))

    plain = {"inputs": (IDS,), "max_batch_size": 8}
    padding = Padding(inputs={"ids": 0}, sizes=(32, 64))
    assert keys([WarmUp(1), WarmUp(8)], **plain) == keys([WarmUp(8), WarmUp(1)], **plain)
    assert keys([WarmUp(1)], **plain) == keys([WarmUp(1)], inputs=(IDS, HINT), max_batch_size=4)
    for other in (
        keys([WarmUp(2)], **plain),
        keys([WarmUp(1)], inputs=(IDS,)),
        keys([WarmUp(1)], inputs=(TensorSpec("ids", "INT64", (99,)),), max_batch_size=8),
        keys([WarmUp(1, 32)], **plain, padding=padding),
    ):
        assert not other & keys([WarmUp(1)], **plain)
    assert len(keys([WarmUp(1, 32), WarmUp(1, 64)], **plain, padding=padding)) == 2


def test_the_first_call_of_a_program_is_beside_the_batches(device):
    """It makes the plans, and takes long: with one row, on the thread that asks."""
    model = manifest(inputs=(IDS,), max_batch_size=8)
    runs = Runs()
    executor = Model(runs)
    warm_up(device, runs, model, [WarmUp(8), WarmUp(4)], executor, fresh=True)
    assert executor.called == [((1, 16), True, True)]
    assert runs.shapes == [(4, 16)] * 2 + [(8, 16)] * 2
    warm_up(device, runs, model, [WarmUp(8)], executor)
    assert len(executor.called) == 1


def test_a_first_call_that_fails_says_nothing(device, capsys):
    """The runs tell for themselves."""
    runs = Runs()
    model = manifest(inputs=(IDS,))
    executor = Model(runs, Failed("model_failed", "no zeros, please"))
    warmth = warm_up(device, runs, model, [WarmUp(1)], executor, fresh=True)
    assert [case.rows for case in warmth.cases.values()] == [1]
    assert not capsys.readouterr().err


def test_each_case_is_run_and_measured(device):
    """The small ones first, each in calls of its own. A case has its rows and its size, and the
    seconds of its last run."""
    runs = Runs()
    model = manifest(inputs=(IDS,), max_batch_size=8)
    warmth = warm_up(device, runs, model, [WarmUp(8), WarmUp(1)])
    cases = [warmth.cases[key] for key in asked(model, [WarmUp(1), WarmUp(8)])]
    assert [(case.rows, case.size) for case in cases] == [(1, 0), (8, 0)]
    assert all(case.seconds > 0 for case in cases)
    assert runs.shapes == [(1, 16)] * 2 + [(8, 16)] * 2
    assert runs.calls == 4


def test_a_peak_is_not_believed_while_memory_moves(device):
    """What another thread loads meanwhile would count as the batch's."""
    grown = []

    def grow():
        grown.append(torch.ones(4 << 20))

    def move():
        grow()
        with moving.unrest:
            pass

    model = manifest(inputs=(IDS,))
    moving = Runs(move)
    warmth = warm_up(device, moving, model, [WarmUp(1)])
    assert [case.workspace_bytes for case in warmth.cases.values()] == [0]
    assert warmth.input_bytes == 0
    grown.clear()
    warmth = warm_up(device, Runs(grow), model, [WarmUp(1)])
    assert [case.workspace_bytes > 15 << 20 for case in warmth.cases.values()] == [True]
    assert warmth.input_bytes == 16 * 8


def test_a_run_that_fails_is_told_and_left_out(device, capsys):
    """Zeros need not suit a model; the other cases are measured all the same."""
    answers = iter([Failed("model_failed", "no zeros, please"), None, None])

    def refuse():
        if (answer := next(answers)) is not None:
            raise answer

    model = manifest(inputs=(IDS,), max_batch_size=8)
    batches = [WarmUp(1), WarmUp(8)]
    warmth = warm_up(device, Runs(refuse), model, batches)
    first, second = (warmth.cases[key] for key in asked(model, batches))
    assert first is None
    assert second.rows == 8
    assert "warm-up of m/1 with 1 rows failed: no zeros, please" in capsys.readouterr().err
