"""A load on its way, and how files are opened for it: as the program of an architecture, or as a
module of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.worker.engine.architectures import Architecture
from services.worker.engine.bare import Unshareable
from services.worker.engine.executor import FORMATS, Executor, ExecutorFormat
from services.worker.engine.failures import Failed
from services.worker.engine.files import ScatteredFile
from services.worker.engine.memory import Device
from services.worker.engine.programs import Skeleton, WholeExecutor
from services.worker.wire import LoadModel
from shared.layout import Layout
from shared.models import Manifest, TensorSpec
from shared.names import ModelId


@dataclass(eq=False)
class Load:
    """One `LoadModel` on its way."""

    command: LoadModel
    file: ScatteredFile
    started: float
    program: Program | None
    """Of the architecture that the file has, whether or not it can be shared."""
    alone: bool = False
    """It turned out that it cannot share its architecture's program."""
    architecture: Literal["known", "new", "none"] = "none"
    source: Literal["disk", "host"] = "disk"
    executor: Executor | None = None
    inputs: tuple[TensorSpec, ...] = ()
    weights_bytes: int = 0

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
    if load.manifest.format == "torchscript":
        executor = WholeExecutor(load.file, load.command.layout, load.manifest, device.torch_device)
    else:
        executor = _form(load).load(load.file, load.manifest, device.torch_device)
    device.synchronize()
    return executor


def _form(load: Load) -> ExecutorFormat:
    form = FORMATS.get(load.manifest.format)
    if form is None:
        raise Failed("model_failed", f"this worker runs no {load.manifest.format} files")
    return form
