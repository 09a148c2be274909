from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
import weakref
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")

from services.worker.arena import Arena  # noqa: E402
from services.worker.engine.channel import BatchChannel  # noqa: E402
from services.worker.engine.dispatch import DeviceLost, Dispatcher, Resident  # noqa: E402
from services.worker.engine.memory import open_device  # noqa: E402
from services.worker.engine.outbox import Outbox  # noqa: E402
from services.worker.engine.signature import Argument  # noqa: E402
from services.worker.engine.streams import HostFlight  # noqa: E402
from services.worker.frames import Frames  # noqa: E402
from services.worker.wire import (  # noqa: E402
    BatchFailed,
    BatchRan,
    ModelLoaded,
    Release,
    RunBatch,
    TensorRef,
    pack,
    unpack_batch_command,
    unpack_event,
)
from shared.models import Manifest  # noqa: E402
from shared.names import ModelId  # noqa: E402

pytestmark = pytest.mark.torch

MODEL = ModelId("m/1")
MANIFEST = Manifest(name="m", version=1, digest="", size_bytes=0, created_at=0.0)
OUTBOX_BYTES = 4096
DEADLINE_S = 10.0


class FragileDevice:
    """A CPU that can be lost, and counts how often it was asked to give memory back."""

    def __init__(self):
        self._cpu = open_device("cpu", 0)
        self.lost = False
        self.reclaimed = 0
        self.cheap_to_measure = False

    def __getattr__(self, name):
        return getattr(self._cpu, name)

    def running(self):
        return contextlib.nullcontext()

    def begin_measuring(self):
        pass

    def peak_bytes(self):
        return 1000

    def reclaim(self):
        self.reclaimed += 1

    def healthy(self):
        return not self.lost


class ScriptedExecutor:
    """Returns or raises what it is told, one after the other."""

    schema = (Argument("x", "tensor"),)

    def __init__(self, *results: Any):
        self._results = list(results)
        self.runs: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run(self, inputs):
        self.runs.put(len(inputs))
        result = self._results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def weights_bytes(self, granule):
        return 0

    def close(self):
        pass


class LateFlight(HostFlight):
    """Its outputs have arrived when the test says so, or raises for it."""

    def __init__(self, lanes: LateLanes):
        super().__init__()
        self._lanes = lanes

    def board(self, inputs, *, move, settle):
        self._lanes.boarded.append((move, settle))
        return inputs

    def seconds(self):
        arrival = self._lanes.arrivals.get(timeout=DEADLINE_S)
        if isinstance(arrival, Exception):
            raise arrival
        return arrival

    def end(self):
        self._lanes.places.release()


class LateLanes:
    """As a device that works beside the dispatch thread, with place for two batches."""

    asynchronous = True

    def __init__(self):
        self.places = threading.Semaphore(2)
        self.arrivals: queue.SimpleQueue[float | Exception] = queue.SimpleQueue()
        self.boarded: list[tuple[bool, bool]] = []

    def flight(self):
        assert self.places.acquire(timeout=DEADLINE_S)
        return LateFlight(self)

    def wait(self):
        for _ in range(2):
            assert self.places.acquire(timeout=DEADLINE_S)
        self.places.release(2)


class Rig:
    """A dispatcher, and the agent's ends of what it works with."""

    def __init__(self, lanes: LateLanes | None = None):
        self.device = FragileDevice()
        self.agent, theirs = socket.socketpair()
        self.agent.settimeout(DEADLINE_S)
        self._frames = Frames(self.agent)
        self.inbox, self.outbox = Arena.create("in", 4096), Arena.create("out", OUTBOX_BYTES)
        self.channel = BatchChannel(theirs)
        self.dispatcher = Dispatcher(
            self.device, self.inbox, Outbox(self.outbox), self.channel, lanes
        )
        self.lost: list[DeviceLost] = []
        self._threads: list[threading.Thread] = []

    def close(self) -> None:
        self.dispatcher.finish()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        self.agent.close()
        self.channel.close()
        self.inbox.close()
        self.outbox.close()

    def loaded(self, executor, manifest=MANIFEST, **more) -> Resident:
        loaded = ModelLoaded(MODEL, (), 0, 0.0)
        resident = self.dispatcher.residents[MODEL] = Resident(executor, manifest, loaded, **more)
        return resident

    def send(self, *commands) -> None:
        self.agent.sendall(b"".join(map(pack, commands)))

    def start(self) -> None:
        for target in (self.dispatcher.serve, self.dispatcher.serve_answers):
            self._threads.append(threading.Thread(target=self._guarded, args=(target,)))
            self._threads[-1].start()

    def _guarded(self, target) -> None:
        try:
            target()
        except DeviceLost as error:
            self.lost.append(error)

    def answer(self) -> BatchRan | BatchFailed:
        while (body := self._frames.take()) is None:
            assert self._frames.receive(), "the dispatcher has closed its socket"
        return unpack_event(body)

    def run(self, executor, *commands) -> list[BatchRan | BatchFailed]:
        """All answers to the commands, which were there before `finish`."""
        self.loaded(executor)
        self.send(*commands)
        self.dispatcher.finish()
        self.dispatcher.serve()
        return [self.answer() for command in commands if isinstance(command, RunBatch)]


@pytest.fixture
def rig():
    with contextlib.closing(Rig()) as rig:
        yield rig


@pytest.fixture
def lanes():
    return LateLanes()


@pytest.fixture
def late(lanes):
    with contextlib.closing(Rig(lanes)) as rig:
        yield rig


def batch(number: int, *inputs: TensorRef) -> RunBatch:
    return RunBatch(number, MODEL, 1, inputs)


def test_a_lost_device_ends_the_dispatching(rig):
    """After an error on a device that no longer answers, no batch may be run, nor answered."""
    rig.device.lost = True
    lost = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(DeviceLost, match="device-side assert"):
        rig.run(ScriptedExecutor(lost, torch.ones(1)), batch(1), batch(2))
    rig.agent.setblocking(False)
    with pytest.raises(BlockingIOError):
        rig.agent.recv(1)


def test_an_error_on_a_sound_device_costs_one_batch(rig):
    """The same words from a device that still computes are the model's failure."""
    error = RuntimeError("CUDA error: no kernel image is available")
    answers = rig.run(ScriptedExecutor(error, torch.ones(1)), batch(1), batch(2))
    assert [type(each) for each in answers] == [BatchFailed, BatchRan]
    assert answers[0].code == "model_failed"
    assert rig.device.reclaimed == 0


def test_memory_is_reclaimed_when_it_ran_out(rig):
    """What the failed batch had taken is given back before the next one runs."""
    error = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    answers = rig.run(ScriptedExecutor(error, torch.ones(1)), batch(1), batch(2))
    assert [getattr(each, "code", None) for each in answers] == ["resource_exhausted", None]
    assert rig.device.reclaimed == 1


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (TensorRef("x", "FP32", (4,), 4090, 16), "input 'x' lies outside the inbox"),
        (TensorRef("x", "FP32", (4,), 0, 15), "input 'x': FP32 [4] is not 15 bytes"),
        (TensorRef("x", "BYTES", (2,), 0, 4), "input 'x': BYTES [2] is not 1 elements"),
        (TensorRef("x", "BYTES", (1,), 0, 3), "input 'x': the length of BYTES element 0"),
    ],
)
def test_inputs_that_contradict_themselves_are_refused(rig, ref, message):
    """No read leaves the inbox, and no tensor has more elements than bytes."""
    (failed,) = rig.run(ScriptedExecutor(), batch(1, ref))
    assert failed.code == "invalid_argument"
    assert failed.message.startswith(message)


@pytest.mark.parametrize(
    "ref",
    [
        TensorRef("x", "FP32", (4,), -8, 16),
        TensorRef("x", "FP32", (-4,), 0, -16),
        TensorRef("x", "FP32", (-1, -4), 0, 16),
    ],
)
def test_inputs_below_nothing_are_no_message(ref):
    """Of these the wire itself knows nothing."""
    with pytest.raises(msgspec.ValidationError, match=">= 0"):
        unpack_batch_command(pack(batch(1, ref))[4:])


def test_a_model_that_is_not_there_is_told(rig):
    """The agent and the engine disagree: the batch says so."""
    rig.send(RunBatch(1, ModelId("other/1"), 1, ()))
    rig.dispatcher.finish()
    rig.dispatcher.serve()
    assert rig.answer().code == "not_found"


def test_the_loader_may_borrow_the_thread(rig):
    """A call from another thread runs although no batch comes, and returns its result."""
    rig.start()
    assert rig.dispatcher.call(lambda: 7) == 7
    assert rig.dispatcher.call(threading.get_ident) != threading.get_ident()


def test_a_full_outbox_waits_for_the_agent(rig):
    """The release comes over the same socket, behind batches that run later."""
    rig.loaded(ScriptedExecutor(*(torch.ones(OUTBOX_BYTES // 4) * n for n in (1, 2, 3))))
    rig.send(batch(1), batch(2), batch(3))
    rig.start()
    first = rig.answer()
    assert first.batch == 1
    for number in (1, 2):
        rig.send(Release((number,)))
        assert rig.answer().batch == number + 1
    assert bytes(rig.outbox.view[:4]) == torch.full((1,), 3.0).numpy().tobytes()


def test_a_batch_without_room_for_ever_fails_alone(rig):
    """Outputs larger than the whole outbox."""
    large, small = torch.ones(OUTBOX_BYTES), torch.ones(1)
    answers = rig.run(ScriptedExecutor(large, small), batch(1), batch(2))
    assert answers[0].code == "too_large"
    assert isinstance(answers[1], BatchRan)


def test_an_agent_that_is_gone_ends_the_dispatching(rig):
    """There is nobody to answer to."""
    rig.agent.close()
    with pytest.raises(ConnectionError):
        rig.dispatcher.serve()


def test_peaks_are_measured_for_growing_inputs(rig):
    """Where measuring costs something, it is done when there is something to learn; and not
    while a load moves what is measured."""
    ref = TensorRef("x", "FP32", (4,), 0, 16)
    commands = [batch(1, ref), batch(2, ref)]
    answers = rig.run(ScriptedExecutor(torch.ones(1), torch.ones(1)), *commands)
    assert [each.workspace_bytes for each in answers] == [1000, 0]


class Doing(ScriptedExecutor):
    """Does something of the test's with the inputs of each batch."""

    def __init__(self, *results: Any, do):
        super().__init__(*results)
        self._do = do

    def run(self, inputs):
        self._do(inputs)
        return super().run(inputs)


X = TensorRef("x", "FP32", (4,), 0, 16)


def test_no_peak_is_told_while_memory_moves(rig):
    """It may be the loader's."""
    with rig.dispatcher.unrest:
        (ran,) = rig.run(ScriptedExecutor(torch.ones(1)), batch(1, X))
    assert ran.workspace_bytes == 0


def test_no_peak_is_told_when_memory_moved_meanwhile(rig):
    """A load that begins and ends within the batch leaves nothing to be seen afterwards."""

    def load(inputs):
        with rig.dispatcher.unrest:
            pass

    executor = Doing(torch.ones(1), torch.ones(1), do=load)
    resident = rig.loaded(executor)
    rig.send(batch(1, X))
    rig.start()
    assert rig.answer().workspace_bytes == 0
    assert resident.workspace_bytes == resident.measured_input_bytes == 0
    executor._do = lambda inputs: None
    rig.send(batch(2, X))
    assert rig.answer().workspace_bytes == 1000


@pytest.mark.parametrize(("may_write", "kept"), [(True, 1.0), (False, 2.0)])
def test_what_may_be_kept_is_copied(rig, may_write, kept):
    """A module of its own may hold on to its inputs, declared or not; the inbox is another
    batch's by then. Programs that write to nothing are spared the copy."""
    seen = []
    executor = Doing(torch.ones(1), torch.ones(1), do=lambda inputs: seen.append(inputs[0][1]))
    rig.loaded(executor, may_write=may_write)
    rig.start()
    for number in (1, 2):
        rig.inbox.view[:16] = torch.full((4,), float(number)).numpy().tobytes()
        rig.send(batch(number, X))
        assert isinstance(rig.answer(), BatchRan)
    assert seen[0].tolist() == [kept] * 4


def test_a_call_that_fails_fails_for_its_caller_alone(rig):
    """Who asked is told why, and the thread goes on."""

    def work():
        raise MemoryError("no room")

    rig.start()
    with pytest.raises(MemoryError, match="no room"):
        rig.dispatcher.call(work)
    assert rig.dispatcher.call(lambda: 7) == 7


def test_a_call_leaves_nothing_behind(rig):
    """What a warm-up ran with is gone although no batch follows it."""
    gone = threading.Event()

    def work():
        return 0

    weakref.finalize(work, gone.set)
    rig.start()
    rig.dispatcher.call(work)
    del work
    assert gone.wait(DEADLINE_S)


# --- a device that works beside the thread


def test_one_batch_is_prepared_while_another_computes(late, lanes):
    """The second runs before the first has arrived, the third has to wait; answers come in
    order and tell the device's own seconds."""
    executor = ScriptedExecutor(*(torch.ones(1) for _ in range(3)))
    late.loaded(executor)
    late.send(batch(1), batch(2), batch(3))
    late.start()
    for _ in range(2):
        executor.runs.get(timeout=DEADLINE_S)
    assert executor.runs.empty()
    for number in (1, 2, 3):
        lanes.arrivals.put(number / 10)
        assert late.answer() == BatchRan(
            number, (TensorRef("OUTPUT__0", "FP32", (1,), (number - 1) * 64, 4),), number / 10, 0
        )


def test_all_is_answered_before_the_end(late, lanes):
    """`serve` returns when the last outputs have arrived."""
    late.loaded(ScriptedExecutor(torch.ones(1), torch.ones(1)))
    late.send(batch(1), batch(2))
    late.dispatcher.finish()
    late.start()
    lanes.arrivals.put(0.1)
    lanes.arrivals.put(0.1)
    assert [late.answer().batch for _ in range(2)] == [1, 2]


def test_a_call_has_the_device_for_itself(late, lanes):
    """What a warm-up measures is its own."""
    late.loaded(ScriptedExecutor(torch.ones(1)))
    late.send(batch(1))
    late.start()
    results: list[float] = []
    calling = threading.Thread(
        target=lambda: results.append(late.dispatcher.call(time.perf_counter))
    )
    calling.start()
    arrived = time.perf_counter()
    lanes.arrivals.put(0.1)
    assert late.answer().batch == 1
    calling.join(DEADLINE_S)
    assert results
    assert results[0] > arrived


def test_room_is_waited_for_while_others_are_answered(late, lanes):
    """The agent releases only what it was told of, so that must not have to wait."""
    late.loaded(ScriptedExecutor(*(torch.ones(OUTBOX_BYTES // 4) for _ in range(2))))
    late.send(batch(1), batch(2))
    late.start()
    lanes.arrivals.put(0.1)
    assert late.answer().batch == 1
    late.send(Release((1,)))
    lanes.arrivals.put(0.1)
    assert late.answer().batch == 2


def test_an_error_that_comes_late_costs_one_batch(late, lanes):
    """The device is asked whether it still works, and the batch's room is free again, for the
    one that may be waiting for it."""
    late.loaded(ScriptedExecutor(*(torch.ones(OUTBOX_BYTES // 4) for _ in range(2))))
    late.send(batch(1), batch(2))
    late.start()
    lanes.arrivals.put(RuntimeError("CUDA error: unspecified"))
    assert late.answer() == BatchFailed(1, "model_failed", "CUDA error: unspecified")
    lanes.arrivals.put(0.1)
    assert late.answer().batch == 2


def test_a_device_lost_while_waiting_for_it_ends_the_engine(late, lanes):
    """Nothing is answered after that."""
    late.device.lost = True
    late.loaded(ScriptedExecutor(torch.ones(1)))
    late.send(batch(1))
    late.start()
    lanes.arrivals.put(RuntimeError("CUDA error: an illegal memory access"))
    late._threads[1].join(DEADLINE_S)
    assert ["illegal memory access" in str(error) for error in late.lost] == [True]
    lanes.places.release()


def test_inputs_move_ahead_where_the_model_takes_nothing_but_tensors(late, lanes):
    """A number is read by the host. And what a model may write to is settled first, unless it
    was found to write nothing."""
    executor = ScriptedExecutor(torch.ones(1), torch.ones(1))
    late.loaded(executor)
    late.start()
    for schema, may_write in (
        (executor.schema, True),
        ((*executor.schema, Argument("n", "int")), False),
    ):
        executor.schema = schema
        late.loaded(executor, may_write=may_write)
        late.send(batch(1))
        lanes.arrivals.put(0.1)
        assert isinstance(late.answer(), BatchRan)
    assert lanes.boarded == [(True, True), (False, False)]


def test_a_peak_has_room_for_the_batch_beside_it(late, lanes):
    """While one computes, another's inputs and outputs may be on the device."""
    late.device.cheap_to_measure = True
    late.loaded(ScriptedExecutor(torch.ones(4)))
    late.send(batch(1, TensorRef("x", "FP32", (8,), 0, 32)))
    late.start()
    lanes.arrivals.put(0.1)
    assert late.answer().workspace_bytes == 1000 + 32 + 64


def test_a_failure_is_answered_in_its_turn(late, lanes):
    """The first batch without an answer is suspected when the process ends: so a batch that
    fails at once waits for the one that is still under way."""
    error = RuntimeError("no")
    executor = ScriptedExecutor(torch.ones(1), error)
    late.loaded(executor)
    late.send(batch(1), batch(2))
    late.start()
    for _ in range(2):
        executor.runs.get(timeout=DEADLINE_S)
    lanes.arrivals.put(0.1)
    assert [type(late.answer()) for _ in range(2)] == [BatchRan, BatchFailed]


def test_memory_is_reclaimed_before_the_next_batch_runs(late, lanes):
    """Not only before the answer, which may have to wait."""
    seen = []
    error = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    executor = Doing(error, torch.ones(1), do=lambda inputs: seen.append(late.device.reclaimed))
    late.loaded(executor)
    late.send(batch(1), batch(2))
    late.start()
    lanes.arrivals.put(0.1)
    answers = [late.answer() for _ in range(2)]
    assert [getattr(each, "code", None) for each in answers] == ["resource_exhausted", None]
    assert seen == [0, 1]


def test_a_peak_counts_what_lay_beside_it(late, lanes):
    """The bytes of a batch that was there when the measurement began are not in the peak."""
    late.device.cheap_to_measure = True
    executor = ScriptedExecutor(torch.ones(4), torch.ones(1))
    late.loaded(executor)
    late.send(batch(1, TensorRef("x", "FP32", (64,), 0, 256)), batch(2))
    late.start()
    for _ in range(2):
        executor.runs.get(timeout=DEADLINE_S)
    lanes.arrivals.put(0.1)
    lanes.arrivals.put(0.1)
    assert [late.answer().workspace_bytes for _ in range(2)] == [1000 + 256 + 64] * 2
