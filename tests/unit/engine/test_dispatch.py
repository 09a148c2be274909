from __future__ import annotations

import contextlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from services.worker.arena import Arena  # noqa: E402
from services.worker.engine.dispatch import DeviceLost, Dispatcher, Resident  # noqa: E402
from services.worker.engine.memory import open_device  # noqa: E402
from services.worker.engine.outbox import Outbox  # noqa: E402
from services.worker.wire import (  # noqa: E402
    BatchFailed,
    BatchRan,
    ModelLoaded,
    RunBatch,
    TensorRef,
)
from shared.models import Manifest  # noqa: E402
from shared.names import ModelId  # noqa: E402

pytestmark = pytest.mark.torch

MODEL = ModelId("m/1")
MANIFEST = Manifest(name="m", version=1, digest="", size_bytes=0, created_at=0.0)


class FragileDevice:
    """A CPU that can be lost, and counts how often it was asked to give memory back."""

    def __init__(self):
        self._cpu = open_device("cpu", 0)
        self.lost = False
        self.reclaimed = 0

    def __getattr__(self, name):
        return getattr(self._cpu, name)

    def running(self):
        return contextlib.nullcontext()

    def reclaim(self):
        self.reclaimed += 1

    def healthy(self):
        return not self.lost


class ScriptedExecutor:
    """Returns or raises what it is told, one after the other."""

    schema = ()

    def __init__(self, *results: Any):
        self._results = list(results)

    def run(self, inputs):
        result = self._results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def weights_bytes(self, granule):
        return 0

    def close(self):
        pass


@pytest.fixture
def device():
    return FragileDevice()


@pytest.fixture
def sent():
    return []


@pytest.fixture
def dispatcher(device, sent):
    inbox, outbox = Arena.create("in", 4096), Arena.create("out", 4096)
    yield Dispatcher(device, inbox, Outbox(outbox), sent.append)
    inbox.close()
    outbox.close()


def run(dispatcher, executor, *commands) -> None:
    loaded = ModelLoaded(MODEL, (), 0, {}, {}, 0.0)
    dispatcher.residents[MODEL] = Resident(executor, MANIFEST, loaded)
    for command in commands:
        dispatcher.submit(command)
    dispatcher.finish()
    dispatcher.serve()


def batch(number: int, *inputs: TensorRef) -> RunBatch:
    return RunBatch(number, MODEL, 1, inputs)


def test_a_lost_device_ends_the_dispatching(dispatcher, device, sent):
    """After an error on a device that no longer answers, no batch may be run, nor answered."""
    device.lost = True
    lost = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(DeviceLost, match="device-side assert"):
        run(dispatcher, ScriptedExecutor(lost, torch.ones(1)), batch(1), batch(2))
    assert sent == []


def test_an_error_on_a_sound_device_costs_one_batch(dispatcher, device, sent):
    """The same words from a device that still computes are the model's failure."""
    error = RuntimeError("CUDA error: no kernel image is available")
    run(dispatcher, ScriptedExecutor(error, torch.ones(1)), batch(1), batch(2))
    assert [type(each) for each in sent] == [BatchFailed, BatchRan]
    assert sent[0].code == "model_failed"
    assert device.reclaimed == 0


def test_memory_is_reclaimed_when_it_ran_out(dispatcher, device, sent):
    """What the failed batch had taken is given back before the next one runs."""
    error = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    run(dispatcher, ScriptedExecutor(error, torch.ones(1)), batch(1), batch(2))
    assert [getattr(each, "code", None) for each in sent] == ["resource_exhausted", None]
    assert device.reclaimed == 1


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (TensorRef("x", "FP32", (4,), 4090, 16), "input 'x' lies outside the inbox"),
        (TensorRef("x", "FP32", (4,), -8, 16), "input 'x' lies outside the inbox"),
        (TensorRef("x", "FP32", (4,), 0, 15), "input 'x': FP32 [4] is not 15 bytes"),
        (TensorRef("x", "FP32", (-4,), 0, -16), "input 'x' lies outside the inbox"),
        (TensorRef("x", "FP32", (-1, -4), 0, 16), "input 'x': FP32 [-1, -4] is not 16 bytes"),
        (TensorRef("x", "BYTES", (2,), 0, 4), "input 'x': BYTES [2] is not 1 elements"),
        (TensorRef("x", "BYTES", (1,), 0, 3), "input 'x': the length of BYTES element 0"),
    ],
)
def test_inputs_that_contradict_themselves_are_refused(dispatcher, sent, ref, message):
    """No read leaves the inbox, and no tensor has more elements than bytes."""
    run(dispatcher, ScriptedExecutor(), batch(1, ref))
    (failed,) = sent
    assert failed.code == "invalid_argument"
    assert failed.message.startswith(message)


def test_the_loader_may_borrow_the_thread(dispatcher):
    """A call from another thread runs in its turn and returns its result."""
    import threading

    results = []
    other = threading.Thread(target=lambda: results.append(dispatcher.call(lambda: 7)))
    other.start()
    ended = threading.Thread(target=lambda: (other.join(10), dispatcher.finish()))
    ended.start()
    dispatcher.serve()
    ended.join(10)
    assert results == [7]
