"""Architectures of many kinds, each with what becomes of it: shared, or a module of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 — as everyone calls it
from torch import Tensor, nn


class Model(NamedTuple):
    make: Callable[[], nn.Module]
    example: Callable[[], Sequence[Tensor]]
    ways: str = "ts"
    """`t`raced, `s`cripted, or both; `f` frozen after scripting."""
    whole: str = ""
    """The ways that need a module of their own."""
    train: bool = False
    """Saved in training mode."""


def _x(*shape: int) -> Callable[[], Sequence[Tensor]]:
    return lambda: (torch.randn(*shape),)


def _ids(*shape: int) -> Callable[[], Sequence[Tensor]]:
    return lambda: (torch.randint(0, 16, shape),)


class ConvNet(nn.Module):
    def __init__(self, *, inplace: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, groups=8, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=inplace)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.head(self.up(x).mean(dim=[2, 3]))


class Rnn(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.rnn = kind(4, 6, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 6)
        self.inner = nn.Linear(6, 6)
        self.out = nn.Linear(6, 16, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.table(ids))))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(16, 6, mode="mean")

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids)


class Views(nn.Module):
    """Buffers that overlap each other in one storage."""

    def __init__(self):
        super().__init__()
        base = torch.zeros(8, 8)
        self.register_buffer("base", base)
        self.register_buffer("part", base.narrow(0, 2, 4))
        self.register_buffer("turned", base.t())
        self.register_buffer("column", base[:, 3])
        self.register_buffer("wide", base[0:1].expand(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.part) @ self.turned
        return (y * self.column + self.wide) @ self.base


class OddLayouts(nn.Module):
    def __init__(self):
        super().__init__()
        self.turned = nn.Parameter(torch.zeros(6, 4).t())
        self.strided = nn.Parameter(torch.zeros(4, 12)[:, ::2])
        self.last = nn.Parameter(torch.zeros(1, 3, 4, 6).to(memory_format=torch.channels_last))
        self.empty = nn.Parameter(torch.zeros(0, 6))
        self.register_buffer("none", torch.zeros(3, 0))
        self.scalar = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x @ self.turned, x @ self.strided, self.empty])
        z = (self.last * self.last.transpose(2, 3).transpose(3, 2)).sum(dim=[0, 1, 2])
        return y * self.scalar + self.none.sum() + z


class Dtypes(nn.Module):
    def __init__(self):
        super().__init__()
        for dtype in (
            *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
            *(torch.complex128, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
            torch.bool,
        ):
            name = str(dtype).removeprefix("torch.")
            self.register_buffer(f"b_{name}", (torch.arange(7) % 5).to(dtype))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.b_float16 * 2, self.b_bfloat16 * 3, self.b_float32 + x, self.b_float64.exp(),
            self.b_complex64.sin(), self.b_complex128.angle(), self.b_uint8 + 250,
            self.b_int8 * 7, self.b_int16 - 9, self.b_int32 // 2, self.b_int64 % 3,
            self.b_bool.logical_not(),
        ]  # fmt: skip


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8)).to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PlainAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.plain = torch.randn(4)
        self.absent: Tensor | None = None
        self.present: Tensor | None = torch.randn(4)
        self.sizes = [1, 2, 3]
        self.factor = 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.weight + self.plain) * self.factor + sum(self.sizes)
        if self.absent is not None:
            y = y - self.absent
        present = self.present
        return y if present is None else y * present


MASK = torch.ones(4, 4).tril()
OFFSETS = torch.arange(4)


class Constants(nn.Module):
    """What it closes over is traced as constants, with keys like those of its weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).masked_fill(MASK == 0, 2.5) + OFFSETS
        return self.second(y) * MASK + torch.tensor([0.25, 0.5, 0.75, 1.0])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.again = self.layer
        self.stack = nn.Sequential(self.layer, nn.ReLU(), self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.stack(self.layer(x)))


class InList(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.listed = [torch.ones(4), torch.full((4,), 2.0)]
        self.named = {"a": torch.full((4,), 3.0)}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.listed[0] * self.listed[1] + self.named["a"]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.other = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, depth: int = 2) -> dict[str, Tensor]:
        out: list[Tensor] = []
        for _ in range(depth):
            for step in self.steps:
                x = step(x)
                out.append(x.sum())
            if bool(x.sum() > 0):
                x = x * self.other
            while bool(x.abs().max() > 10.0):
                x = x / 2
        return {"x": x, "sums": torch.stack(out)}


class Inplace(nn.Module):
    """Writes a lot, and nothing that it keeps."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y.relu_().add_(1.0)
        y[:, 1:3] = self.scale[1:3]
        kept = torch.zeros_like(y)
        kept.copy_(y)
        kept += self.scale
        return kept


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight, x * self.weight


def _shifted(x: Tensor) -> Tensor:
    return x * 2 + 1


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        return _shifted(self.inner(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x) + self.encode(-x)


class WritesBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.sum(0)
        return x + self.total


class WritesParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.inner.weight.detach().view(-1).mul_(0.5)
        return y


class WritesThroughBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x if bool(x.sum() > 1e6) else self.weight.detach()
        chosen.add_(1.0)
        return x * self.weight


class WritesThroughList(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        held = [x, self.weight.detach()]
        for each in held:
            each.add_(1.0)
        return x * self.weight


class SetsAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.last = torch.zeros(4)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        before = self.last
        self.last = x.sum(0)
        self.count += 1
        return x * self.weight + before + self.count


class GrowsList(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.seen = [1]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        return x * self.weight + len(self.seen)


class WritesConstant(nn.Module):
    """Traced, it adds to a tensor that is part of its code."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + STATE.add_(1.0)


STATE = torch.zeros(4)


class KeepsStatistics(nn.Module):
    """In evaluation, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, training=True, momentum=0.3)


class NoStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.norm = nn.InstanceNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.batch_norm(x, None, None, self.scale, training=True))


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inner = torch.ao.quantization.quantize_dynamic(
                nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {nn.Linear}, dtype=torch.qint8
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class QuantizedBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        drawn = torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint8)
        self.register_buffer("kept", drawn)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept.dequantize()


class SetsState(nn.Module):
    """Its weights are made while it is loaded."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(4)

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]):
        self.weight = state[0] * 2
        self.training = state[1]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Conjugated(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.randn(4, dtype=torch.complex64).conj())

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real((x * self.kept).resolve_conj())


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.5), nn.Linear(12, 3))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, Model] = {
    "mlp": Model(_mlp, _x(3, 6), "tsf"),
    "mlp saved in training": Model(_mlp, _x(3, 6), "s", train=True),
    "conv net": Model(ConvNet, _x(2, 3, 8, 8), "tsf"),
    "conv net saved in training": Model(ConvNet, _x(2, 3, 8, 8), "s", train=True),
    "conv net in place": Model(lambda: ConvNet(inplace=True), _x(2, 3, 8, 8)),
    "lstm": Model(lambda: Rnn(nn.LSTM), _x(2, 5, 4), whole="s"),
    "gru": Model(lambda: Rnn(nn.GRU), _x(2, 5, 4), whole="s"),
    "attention": Model(Attention, _x(2, 5, 8)),
    "transformer": Model(_encoder, _x(2, 5, 8), whole="s"),
    "tied": Model(Tied, _ids(2, 5), "tsf"),
    "embedding bag": Model(Bag, _ids(3, 4)),
    "views": Model(Views, _x(4, 4)),
    "odd layouts": Model(OddLayouts, _x(3, 4)),
    "dtypes": Model(Dtypes, _x(7), "s"),
    "bfloat16": Model(lambda: Cast(torch.bfloat16), lambda: (torch.randn(2, 6).bfloat16(),)),
    "float16": Model(lambda: Cast(torch.float16), lambda: (torch.randn(2, 6).half(),)),
    "float64": Model(lambda: Cast(torch.float64), lambda: (torch.randn(2, 6).double(),)),
    "plain attribute": Model(PlainAttribute, _x(3, 4), "s"),
    "constants": Model(Constants, _x(4, 4), "t"),
    "twice": Model(Twice, _x(3, 5)),
    "tensors in a list": Model(InList, _x(4), "s", whole="s"),
    "branches": Model(Branches, _x(2, 4), "s"),
    "in place": Model(Inplace, _x(2, 4)),
    "returned": Model(Returned, _x(4)),
    "calls": Model(Calls, _x(2, 4), "s"),
    "writes a buffer": Model(WritesBuffer, _x(2, 4), "ts", whole="ts"),
    "writes a parameter": Model(WritesParameter, _x(2, 4), "ts", whole="ts"),
    "writes through a branch": Model(WritesThroughBranch, _x(4), "s", whole="s"),
    "writes through a list": Model(WritesThroughList, _x(4), "s", whole="s"),
    "sets an attribute": Model(SetsAttribute, _x(2, 4), "s", whole="s"),
    "grows a list": Model(GrowsList, _x(2, 4), "s", whole="s"),
    "writes a constant": Model(WritesConstant, _x(2, 4), "t", whole="t"),
    "keeps statistics": Model(KeepsStatistics, _x(4, 3, 5), "ts", whole="ts"),
    "no statistics": Model(NoStatistics, _x(4, 3, 5)),
    "quantized": Model(Quantized, _x(2, 4), "s", whole="s"),
    "quantized buffer": Model(QuantizedBuffer, _x(2, 4), "s", whole="s"),
    "sets its state": Model(SetsState, _x(4), "s", whole="s"),
    "conjugated": Model(Conjugated, _x(4), "s", whole="s"),
}
