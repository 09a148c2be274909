from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.memory import open_device  # noqa: E402
from services.worker.engine.warming import (  # noqa: E402
    Moves,
    Warmer,
    may_be_warmed,
    zero_inputs,
)
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
        self.shapes = []
        self._on_run = on_run

    def call(self, function):
        return function()

    def outputs_of(self, executor, of, inputs, rows):
        self.shapes.append(tuple(inputs[0][1].shape))
        self._on_run()
        return []


@pytest.fixture
def moves():
    return Moves(threading.Event())


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
    assert may_be_warmed(manifest(inputs=()))
    assert not may_be_warmed(manifest())
    assert not may_be_warmed(manifest(inputs=(), stateful=True))


def test_each_case_is_run_and_measured(device, moves):
    """A case has its rows and its size, and the seconds of its last run."""
    runs = Runs()
    warmer = Warmer(device, runs, moves)
    model = manifest(inputs=(IDS,), max_batch_size=8)
    cases, _ = warmer.warm_up(None, model, [WarmUp(1), WarmUp(8)])
    assert [(case.rows, case.size) for case in cases] == [(1, 0), (8, 0)]
    assert all(case.seconds > 0 for case in cases)
    assert runs.shapes == [(1, 16)] * 2 + [(8, 16)] * 2


def test_a_peak_is_not_believed_while_memory_moves(device, moves):
    """What another thread loads meanwhile would count as the batch's."""
    grown = []

    def grow():
        grown.append(torch.ones(4 << 20))
        with moves:
            pass

    model = manifest(inputs=(IDS,))
    warmth = Warmer(device, Runs(grow), moves).warm_up(None, model, [WarmUp(1)])
    assert [case.workspace_bytes for case in warmth.cases] == [0]
    assert warmth.input_bytes == 0
    grown.clear()
    warmth = Warmer(device, Runs(lambda: grown.append(torch.ones(4 << 20))), moves).warm_up(
        None, model, [WarmUp(1)]
    )
    assert warmth.cases[0].workspace_bytes > 15 << 20
    assert warmth.input_bytes == 16 * 8


def test_a_run_that_fails_is_told_and_left_out(device, moves, capsys):
    """Zeros need not suit a model; the other cases are measured all the same."""
    answers = iter([Failed("model_failed", "no zeros, please"), None, None])

    def refuse():
        if (answer := next(answers)) is not None:
            raise answer

    model = manifest(inputs=(IDS,), max_batch_size=8)
    warmth = Warmer(device, Runs(refuse), moves).warm_up(None, model, [WarmUp(1), WarmUp(8)])
    assert [case.rows for case in warmth.cases] == [8]
    assert "warm-up of m/1 with 1 rows failed: no zeros, please" in capsys.readouterr().err


def test_moves_nest(moves):
    """Memory moves until the last one has ended, in whatever order they end."""
    quiet = moves.quiet()
    with moves:
        with moves:
            assert moves.quiet() is None
        assert moves.quiet() is None
    assert moves.quiet() not in {None, quiet}
