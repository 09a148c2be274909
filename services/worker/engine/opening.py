"""A load on its way, how files are opened for it (as the program of an architecture, or as a
module of their own), and what it ends as."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from services.worker.engine.architectures import Architecture
from services.worker.engine.bare import Unshareable
from services.worker.engine.dispatch import Resident
from services.worker.engine.executor import FORMATS, Executor, ExecutorFormat
from services.worker.engine.failures import Failed
from services.worker.engine.files import ScatteredFile
from services.worker.engine.memory import Device
from services.worker.engine.programs import Skeleton, WholeExecutor
from services.worker.engine.warming import asked
from services.worker.wire import LoadModel, ModelLoaded, WarmUp
from shared.layout import Layout
from shared.models import Case, Manifest, TensorSpec
from shared.names import ModelId


@dataclass(eq=False)
class Load:
    """One `LoadModel` on its way."""

    command: LoadModel
    file: ScatteredFile
    started: float
    program: Program | None
    """Of the architecture that the file has, whether or not it can be shared."""
    steps: Generator[None] | None = None
    """Of a hold that has begun."""
    alone: bool = False
    """It turned out that it cannot share its architecture's program."""
    architecture: Literal["known", "new", "none"] = "none"
    source: Literal["disk", "host"] = "disk"
    executor: Executor | None = None
    inputs: tuple[TensorSpec, ...] = ()
    weights_bytes: int = 0
    asked: dict[Hashable, WarmUp] = field(default_factory=dict)
    """The warm-ups that it wants to have been run."""

    def __post_init__(self) -> None:
        self.asked = asked(self.manifest, self.command.warm)

    @property
    def model(self) -> ModelId:
        return self.command.model

    @property
    def manifest(self) -> Manifest:
        return self.command.manifest

    @property
    def layout(self) -> Layout:
        """Of a file that has a program."""
        assert self.command.layout is not None
        return self.command.layout

    @property
    def shared(self) -> Program | None:
        """The program that it shares with others; None when it needs a module of its own."""
        if self.alone or self.program is None or self.program.unshareable is not None:
            return None
        return self.program


Program = Architecture[Load]


def has_program(command: LoadModel) -> bool:
    """Whether the file may share its architecture's program, as far as can be told without the
    graph."""
    layout, manifest = command.layout, command.manifest
    if manifest.format != "torchscript" or manifest.stateful:
        return False
    return layout is not None and layout.obstacle is None and bool(layout.architecture)


def parse(load: Load, device: Device) -> Skeleton | Unshareable:
    """The program of the file's architecture. Raises what `Skeleton.load` does."""
    try:
        with _settings():
            return Skeleton.load(load.file, load.layout, device.torch_device)
    except Unshareable as why:
        return Unshareable(str(why))  # without the frames


def estimate(load: Load) -> int:
    """Bytes of a module of its own, before it is loaded. Raises `Failed`."""
    if load.manifest.format != "torchscript":
        return _form(load).estimate(load.file)
    layout = load.command.layout
    return layout.weights_bytes if layout is not None and layout.blocks else load.file.size


def open_whole(load: Load, device: Device) -> Executor:
    """A module of its own, on the device. Raises whatever the file makes torch raise."""
    executor: Executor
    target = device.torch_device
    with _settings():
        if load.manifest.format == "torchscript":
            executor = WholeExecutor(load.file, load.command.layout, load.manifest, target)
        else:
            executor = _form(load).load(load.file, load.manifest, target)
    device.synchronize()
    return executor


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Torch's own, in a thread that has those for running models: its tensors are for other
    threads, and without optimization torch inlines no calls, so that what a program writes could
    not be seen."""
    jit: Any = torch.jit  # torch leaves it untyped
    with jit.optimized_execution(True), torch.inference_mode(mode=False):
        yield


def _form(load: Load) -> ExecutorFormat:
    form = FORMATS.get(load.manifest.format)
    if form is None:
        raise Failed("model_failed", f"this worker runs no {load.manifest.format} files")
    return form


def on_device(load: Load, cases: Mapping[Hashable, Case | None], input_bytes: int) -> Resident:
    """What batches find, and its answer. `cases` and `input_bytes`: what is known of the warm-ups
    that it asked for, and of the greatest inputs that were measured."""
    assert load.executor is not None
    known = tuple(case for key in load.asked if (case := cases.get(key)) is not None)
    event = ModelLoaded(
        load.model,
        load.inputs,
        load.weights_bytes,
        time.perf_counter() - load.started,
        known,
        source=load.source,
        architecture=load.architecture,
    )
    layout = load.command.layout
    before = load.shared.workspace_bytes if load.shared is not None else 0
    return Resident(
        load.executor,
        load.manifest,
        event,
        input_bytes,
        may_write=load.shared is None and (layout is None or layout.may_write),
        workspace_bytes=max(before, *(case.workspace_bytes for case in known), 0),
    )


def in_host(load: Load) -> ModelLoaded:
    """A model that needs a module of its own keeps nothing in the host's memory: it comes from
    the disk each time, and says so by its zero bytes."""
    nbytes = load.layout.weights_bytes if load.shared is not None else 0
    seconds = time.perf_counter() - load.started
    return ModelLoaded(load.model, (), nbytes, seconds, tier="host")
