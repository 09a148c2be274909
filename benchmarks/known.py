"""Models whose answers are known: `y = k * x`, with a k of its own each, so that an answer of
another model, or to another request, is seen to be wrong."""

from __future__ import annotations

import io
import json
import warnings
from typing import Any, Final

import msgspec
import torch

from shared.models import ModelSpec, TensorSpec
from shared.repository import Repository

WIDTH: Final = 4


class Model(msgspec.Struct, frozen=True):
    name: str
    factor: int

    def right(self, x: list[int]) -> list[int]:
        """What it answers."""
        return [self.factor * each for each in x]


def register(repository: Repository, count: int) -> list[Model]:
    """Small scripted models, each a file of its own. Blocks; needs torch."""
    spec = ModelSpec(
        inputs=(TensorSpec("x", "FP32", (WIDTH,)),),
        outputs=(TensorSpec("y", "FP32", (WIDTH,)),),
        max_batch_size=16,
    )
    made = []
    for factor in range(2, count + 2):
        name = f"times-{factor:03d}"
        digest, _ = repository.files.put([_file(factor)])
        repository.register(name, 1, spec, digest)
        made.append(Model(name, factor))
    return made


def body(x: list[int], timeout_s: float | None = None) -> bytes:
    """Of a request, over HTTP and AMQP."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": x}
    timeout = {} if timeout_s is None else {"parameters": {"timeout": int(timeout_s * 1e6)}}
    return json.dumps({"inputs": [tensor], **timeout}).encode()


class _Times(torch.nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((WIDTH,), float(factor)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def _file(factor: int) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted: Any = torch.jit.script(_Times(factor))
        torch.jit.save(scripted, out)
    return out.getvalue()
