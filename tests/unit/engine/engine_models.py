"""Small scripted models, each with one habit that a served model may have."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.layout import Layout
from shared.layout.torchscript import read_layout


def save(module: nn.Module, path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return str(path)


def layout_of(path) -> Layout:
    return read_layout(path)


def answer(path, *inputs: Tensor, device="cpu") -> Tensor:
    """What torch itself makes of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(str(path), map_location=device).eval()
    with torch.inference_mode(), torch.jit.optimized_execution(False):
        return module(*inputs)


class Linear(nn.Module):
    """y = 2x + 1, over the last dimension."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        with torch.no_grad():
            self.layer.weight.fill_(2.0)
            self.layer.bias.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class DictOutput(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"doubled": x * 2, "sum": x.sum(1)}


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class NamedOutput(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x + 1, x - 1)


class TwoOutputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + b, (a - b).t()


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            raise ValueError("positive sums are not for me")
        return x


class Counter(nn.Module):
    """Keeps state, and takes a number that is no tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(1, dtype=torch.int64))

    def forward(self, step: int, scale: float = 1.0, negate: bool = False) -> Tensor:
        self.total += step
        result = self.total * scale
        return -result if negate else result


class Keeper(nn.Module):
    """Answers with what it was given the time before."""

    def __init__(self):
        super().__init__()
        self.last = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        before = self.last
        self.last = x
        return before


class ForgetsRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


class Texts(nn.Module):
    def forward(self, texts: list[str], prefix: str = "") -> list[str]:
        return [prefix + text.upper() for text in texts]


class MaybeMask(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Scalars(nn.Module):
    def forward(self, x: Tensor) -> tuple[int, float, bool, Tensor | None]:
        return x.numel(), float(x.sum()), True, None


class Nested(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x, [x]


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x, x)


class Grows(nn.Module):
    """Returns, or only touches on its way, as many floats as it is told."""

    def forward(self, count: int, give: bool = True) -> Tensor:
        grown = torch.ones(count)
        return grown if give else grown.sum()


class Dictionary(nn.Module):
    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return x["a"]


class NoForward(nn.Module):
    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        return x


class Weights(nn.Module):
    """`megabytes` of weights in few tensors, of which no two are equal."""

    def __init__(self, megabytes: int, first: float = 0.5):
        super().__init__()
        self.blocks = nn.ParameterList(
            nn.Parameter(torch.full((256, 1024), first + n)) for n in range(megabytes)
        )
        self.tied = self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.sum() * 0
        return x


class Big(nn.Module):
    """Touches `count` floats where its input is."""

    def forward(self, x: Tensor, count: int) -> Tensor:
        return x.expand(count).clone().sum()


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class Adds(nn.Module):
    """Adds `n`, which is its only weight."""

    def __init__(self, n: float):
        super().__init__()
        self.n = nn.Parameter(torch.full((4,), float(n)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.n


def make_adds(name: str) -> type[nn.Module]:
    """`Adds` under another name: another architecture."""
    return type(name, (Adds,), {"__module__": __name__})


class Counts(nn.Module):
    """Adds how often it was called, from `n` on."""

    def __init__(self, n: float):
        super().__init__()
        self.register_buffer("n", torch.full((4,), float(n)))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return x + self.n


class Tampers(nn.Module):
    """Writes to its weight by way of a view."""

    def __init__(self, n: float):
        super().__init__()
        self.n = nn.Parameter(torch.full((4,), float(n)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        row = self.n.view(2, 2)[0]
        row.mul_(2)
        return x + self.n


class Net(nn.Module):
    """A little of what real models have: tied weights, a buffer, a norm, several dtypes."""

    def __init__(self, seed: int, width: int = 32):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, width)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 4 * width).to(torch.bfloat16)
        self.back = nn.Linear(4 * width, width)
        self.out = nn.Linear(width, 50, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("offset", torch.randint(0, 5, (1,)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids + self.offset))
        x = x + self.back(torch.relu(self.hidden(x.to(torch.bfloat16))).to(torch.float32))
        return self.out(x)
