"""Models to export and to compile, and what the executors are called with."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from services.worker.engine.files import ScatteredFile
from shared.layout import Extent
from shared.models import Manifest

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


def manifest(**spec) -> Manifest:
    return Manifest(
        name="m", version=1, digest="sha256:" + "0" * 64, size_bytes=1, created_at=0.0, **spec
    )


def scattered(path, pieces: int = 1) -> ScatteredFile:
    """The file, as if it lay in several."""
    size = Path(path).stat().st_size
    bounds = [size * index // pieces for index in range(pieces + 1)]
    return ScatteredFile(
        [Extent(str(path), start, end - start) for start, end in itertools.pairwise(bounds)]
    )


def export(module: nn.Module, *args, path, kwargs=None, **options) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), args, kwargs, **options)
        torch.export.save(program, path)
    return str(path)


def recipe(number: int) -> str:
    """The code that docs/models.md shows for `.pt2`, by its place."""
    text = (ROOT / "docs/models.md").read_text()
    section = text.partition("## TorchScript, `torch.export`, AOTInductor\n")[2]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[number]


class Linear(nn.Module):
    """y = 2x + 1, summed over the last dimension."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 3)
        with torch.no_grad():
            self.layer.weight.fill_(2.0)
            self.layer.bias.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Everything(nn.Module):
    """A tied weight, buffers of both kinds, a plain attribute, keywords, a dict."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.register_buffer("kept", torch.randn(16))
        self.register_buffer("unkept", torch.randn(16), persistent=False)
        self.plain = torch.randn(16)

    def forward(self, x: Tensor, *, mask: Tensor, scale: int = 3, bias: Tensor | None = None):
        y = self.b(torch.relu(self.a(x) + self.kept)) * mask + self.unkept
        return {"y": y * scale + self.plain, "sum": y.sum(1)}


class Adds(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x - y


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.total.view(-1).add_(1)
        return x * self.total


class NestedInput(nn.Module):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return xs[0] + xs[1]


class NestedOutput(nn.Module):
    def forward(self, x: Tensor):
        return x, [x + 1]


class Varying(nn.Module):
    def forward(self, x: Tensor, n: int) -> Tensor:
        return x * n


class Weights(nn.Module):
    """`megabytes` of weights in few tensors."""

    def __init__(self, megabytes: int):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(megabytes)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
