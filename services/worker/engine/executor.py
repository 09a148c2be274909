"""What the engine asks of a model file, whatever its format, and who can execute which format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import torch

from services.worker.engine.signature import Argument
from services.worker.engine.tensors import Value
from services.worker.engine.torchscript import TorchScriptExecutor, archived_bytes
from shared.models import Format, Manifest


class Executor(Protocol):
    """One loaded model."""

    @property
    def schema(self) -> tuple[Argument, ...]:
        """The model's arguments, by the file itself."""

    def run(self, inputs: Sequence[tuple[str, Value]]) -> object:
        """What the model returns for these inputs (host memory), on its own device.

        Raises `Failed` when the inputs do not suit the schema, and whatever the model raises.
        """

    def weights_bytes(self, granule: int) -> int:
        """Bytes that the model keeps on its device, each storage rounded up to `granule`."""

    def close(self) -> None:
        """Lets go of everything; nothing else may be called after it."""


class ExecutorFormat(NamedTuple):
    """How models of one format come to be."""

    estimate: Callable[[str], int]
    """Bytes that the file will take on the device, told without loading it."""
    load: Callable[[str, Manifest, torch.device], Executor]


FORMATS: Final[dict[Format, ExecutorFormat]] = {
    "torchscript": ExecutorFormat(archived_bytes, TorchScriptExecutor),
}
