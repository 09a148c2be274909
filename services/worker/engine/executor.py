"""What the engine asks of a loaded model, whatever its format, and who loads the formats whose
files are loaded as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import torch

from services.worker.engine import aotinductor, exported
from services.worker.engine.files import ScatteredFile
from services.worker.engine.signature import Argument
from services.worker.engine.tensors import Value
from shared.models import Format, Manifest


class Executor(Protocol):
    """One loaded model."""

    @property
    def schema(self) -> tuple[Argument, ...]:
        """The model's arguments, by the file itself."""

    def run(self, inputs: Sequence[tuple[str, Value]]) -> object:
        """What the model returns for these inputs, on its own device, wherever they are.

        Raises `Failed` when the inputs do not suit the schema, and whatever the model raises.
        """

    def weights_bytes(self, granule: int) -> int:
        """Bytes that the model keeps on its device, each storage rounded up to `granule`."""

    def close(self) -> None:
        """Lets go of everything; nothing else may be called after it."""


class ExecutorFormat(NamedTuple):
    """How models of one format come to be."""

    estimate: Callable[[ScatteredFile], int]
    """Bytes that the file will take on the device, told without loading it."""
    load: Callable[[ScatteredFile, Manifest, torch.device], Executor]


FORMATS: Final[dict[Format, ExecutorFormat]] = {
    "export": ExecutorFormat(exported.estimate, exported.ExportedExecutor),
    "aotinductor": ExecutorFormat(aotinductor.estimate, aotinductor.AotInductorExecutor),
}
"""Formats other than TorchScript, whose programs and weights the engine does not tell apart."""
