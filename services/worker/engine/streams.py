"""How a batch gets onto the device and off it again, and how long it was there.

On a CPU a batch lies where it is run: there is nothing to move, and it has ended when its model
returns. On CUDA the inputs are copied on one stream, models run on a second (the current one of
the dispatch thread), outputs are copied on a third. So while one batch computes, the next one's
inputs arrive and the last one's outputs leave; the thread that answers waits for the device,
and the one that runs models does not.

Why no batch sees another's bytes: whatever a batch has on the device is held by its `Flight`
until the last event of the batch has come, so torch's allocator cannot give it to another
stream before; and its bytes in the inbox and the outbox are its own until it is answered.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch

from services.worker.arena import Arena
from services.worker.engine.memory import Device
from services.worker.engine.pinning import pin
from services.worker.engine.tensors import Output, Value, write
from services.worker.wire import TensorRef

Inputs = Sequence[tuple[str, Value]]

_AT_ONCE: Final = 2
"""Batches on the device: one computes, while the other comes or goes."""


class Flight(Protocol):
    """One batch, from its inputs to its outputs."""

    def board(self, inputs: Inputs, *, move: bool, settle: bool) -> Inputs:
        """The inputs for the model, on their way to the device if they are to `move`. With
        `settle` the model begins only when the outputs of earlier batches have been copied."""

    def computed(self) -> None:
        """The model has returned."""

    def leave(self, arena: Arena, offset: int, outputs: Sequence[Output]) -> tuple[TensorRef, ...]:
        """The outputs are on their way into the block at `offset`."""

    def seconds(self) -> float:
        """Waits until the outputs are there; how long the device worked for this batch.

        Raises what the device raises, then or since.
        """

    def end(self) -> None:
        """Once, however it went."""


class Lanes(Protocol):
    """The ways on and off one device."""

    asynchronous: bool
    """Whether a batch may still be under way when its outputs have been told to `leave`."""

    def flight(self) -> Flight:
        """The next batch's; waits until there is place for it. On the dispatch thread."""

    def wait(self) -> None:
        """Until no batch is under way."""


class HostFlight:
    """A batch that is where it has to be."""

    __slots__ = ("_began", "_seconds")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._began = time.perf_counter()

    def board(self, inputs: Inputs, *, move: bool, settle: bool) -> Inputs:  # noqa: ARG002
        return inputs

    def computed(self) -> None:
        self._seconds = time.perf_counter() - self._began

    def leave(self, arena: Arena, offset: int, outputs: Sequence[Output]) -> tuple[TensorRef, ...]:
        began = time.perf_counter()
        refs = write(arena, offset, outputs)
        self._seconds += time.perf_counter() - began
        return refs

    def seconds(self) -> float:
        return self._seconds

    def end(self) -> None:
        pass


class HostLanes:
    asynchronous = False

    def flight(self) -> HostFlight:
        return HostFlight()

    def wait(self) -> None:
        pass


class CudaFlight:
    """Six events mark the stretches of the way, so that what they measure leaves out how long
    one stretch waited for another batch's."""

    def __init__(self, lanes: CudaLanes, marks: list[Any]) -> None:
        self._lanes = lanes
        self._marks = marks
        self._compute = torch.cuda.current_stream(lanes.device)
        self._held: list[object] = []

    def board(self, inputs: Inputs, *, move: bool, settle: bool) -> Inputs:
        start, arrived, begun, *_ = self._marks
        with torch.cuda.stream(self._lanes.inward):
            start.record()
            if move:
                inputs = [(name, self._sent(value)) for name, value in inputs]
            arrived.record()
        self._held.append(inputs)
        self._compute.wait_event(arrived)
        if settle:
            self._compute.wait_stream(self._lanes.outward)
        begun.record(self._compute)
        return inputs

    def _sent(self, value: Value) -> Value:
        if isinstance(value, list):
            return value
        return value.to(self._lanes.device, non_blocking=True)

    def computed(self) -> None:
        self._marks[3].record(self._compute)

    def leave(self, arena: Arena, offset: int, outputs: Sequence[Output]) -> tuple[TensorRef, ...]:
        *_, computed, leaving, done = self._marks
        self._held.append(outputs)
        with torch.cuda.stream(self._lanes.outward):
            self._lanes.outward.wait_event(computed)
            leaving.record()
            refs = write(arena, offset, outputs)
            done.record()
        return refs

    def seconds(self) -> float:
        start, arrived, begun, computed, leaving, done = self._marks
        done.synchronize()
        stretches = ((start, arrived), (begun, computed), (leaving, done))
        milliseconds: float = sum(since.elapsed_time(until) for since, until in stretches)
        return milliseconds / 1e3

    def end(self) -> None:
        self._held.clear()
        self._lanes.landed(self._marks)


class CudaLanes:
    asynchronous = True

    def __init__(self, device: torch.device, arenas: Sequence[Arena]) -> None:
        new_stream: Any = torch.cuda.Stream  # torch leaves it untyped
        self.device = device
        self.inward = new_stream(device)
        self.outward = new_stream(device)
        self._places: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        for _ in range(_AT_ONCE):
            self._places.put([_mark() for _ in range(6)])
        for arena in arenas:
            pin(_address(arena), arena.capacity, device)

    def flight(self) -> CudaFlight:
        return CudaFlight(self, self._places.get())

    def landed(self, marks: list[Any]) -> None:
        self._places.put(marks)

    def wait(self) -> None:
        for marks in [self._places.get() for _ in range(_AT_ONCE)]:
            self._places.put(marks)


def lanes_of(device: Device, inbox: Arena, outbox: Arena) -> Lanes:
    if device.torch_device.type == "cuda":
        return CudaLanes(device.torch_device, (inbox, outbox))
    return HostLanes()


def _mark() -> Any:
    # The waiting thread sleeps: a spinning one would take a core from whoever feeds the device.
    new_event: Any = torch.cuda.Event  # torch leaves it untyped
    return new_event(enable_timing=True, blocking=True)


def _address(arena: Arena) -> int:
    return torch.frombuffer(arena.view, dtype=torch.uint8).data_ptr()
