"""The models of the soak: small, of every kind that an engine treats in a way of its own."""

from __future__ import annotations

import io
import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any, Final

import msgspec
import torch
from torch import Tensor, nn

from shared.models import ModelSpec, TensorSpec
from shared.repository import Repository

WIDTH: Final = 16
_BALLAST: Final = 256 * 1024
"""Floats: 1 MiB of weights each, that are looked at."""


class SoakModel(msgspec.Struct, frozen=True):
    """`y = factor * x`, so that an answer of another model is seen to be wrong."""

    name: str
    factor: int

    def answer(self, x: list[int]) -> list[float]:
        return [float(self.factor * each) for each in x]


class _Affine(nn.Module):
    """Fine-tunes of one program: its skeleton is pointed at the weights of one after another."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((WIDTH,), float(factor)))
        self.ballast = nn.Parameter(torch.zeros(_BALLAST).fill_(float(factor)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + (self.ballast[0] - self.ballast[1])


class _Deep(nn.Module):
    """A program of its own: as many steps as are asked for, so that no two files are alike."""

    def __init__(self, factor: int, steps: int) -> None:
        super().__init__()
        self.inner = _Affine(factor)
        self.steps = nn.ModuleList([nn.Identity() for _ in range(steps)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for step in self.steps:
            x = step(x) + 0.0
        return x


class _Writing(nn.Module):
    """Writes to a tensor of its own, so it is loaded whole: nothing of it is shared."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.inner = _Affine(factor)
        self.register_buffer("calls", torch.zeros(1))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1.0
        y: Tensor = self.inner(x)
        return y + (self.calls - self.calls)


def register(repository: Repository, *, alike: int, own: int, writing: int) -> list[SoakModel]:
    """Registers so many fine-tunes, programs of their own, and models that write. Blocks."""
    spec = ModelSpec(
        inputs=(TensorSpec("x", "FP32", (WIDTH,)),),
        outputs=(TensorSpec("y", "FP32", (WIDTH,)),),
        max_batch_size=4,
    )
    kinds: tuple[tuple[str, int, Callable[[int], nn.Module]], ...] = (
        ("alike", alike, _Affine),
        ("own", own, lambda factor: _Deep(factor, factor)),
        ("writing", writing, _Writing),
    )
    factors = itertools.count(2)
    made = []
    for kind, count, module_of in kinds:
        for number in range(count):
            model = SoakModel(f"{kind}-{number:02d}", next(factors))
            digest, _ = repository.files.put([_file(module_of(model.factor))])
            repository.register(model.name, 1, spec, digest)
            made.append(model)
    return made


def body(x: list[int]) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": x}
    return json.dumps({"inputs": [tensor]}).encode()


def _file(module: nn.Module) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted: Any = torch.jit.script(module.eval())
        torch.jit.save(scripted, out)
    return out.getvalue()
