"""Layouts of what torch itself writes."""

import io
from enum import Enum
from functools import reduce
from typing import List, Optional  # noqa: UP035 — TorchScript knows these

import pytest

from shared.layout import Layout
from shared.layout.torchscript import read_layout

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.torch,
    # Of torch's own LSTM: it looks at its input's shape.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
Tensor = torch.Tensor
nn = torch.nn


class Color(Enum):
    RED = 1
    BLUE = 2


class Encoder(nn.Module):
    """Attention, norms, an embedding tied to the head, buffers and views."""

    def __init__(self, seed: int = 0, width: int = 8):
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(16, width)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(width, 2, 16, batch_first=True) for _ in range(2)]
        )
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 16)
        self.head.weight = self.words.weight
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scale", torch.rand(width).double())
        self.register_buffer("view", torch.rand(width, 3).t()[1:])

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x)
        for layer in self.layers:
            y = layer(y)
        y = self.norm(y.mean(1)) * self.scale.float() + self.view.sum()
        return self.head(y)


class Shifted(nn.Module):
    """With a tensor that becomes a constant of what is traced."""

    def __init__(self, shift: float):
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.shift = [torch.tensor([shift])]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.shift[0]


class Odd(nn.Module):
    """Every kind of attribute that is no tensor."""

    none: Optional[Tensor]  # noqa: UP045 — TorchScript knows this

    def __init__(self, color: Color = Color.RED, text: str = "a", number: int = 1):
        super().__init__()
        self.w = nn.Parameter(torch.arange(4.0))
        self.half = torch.ones(2, dtype=torch.bfloat16)
        self.flags = torch.tensor([True, False])
        self.color = color
        self.text = text
        self.number = number
        self.table = {"a": 1}
        self.numbers = [1.5, 2.5]
        self.pair = (1, "b")
        self.none = None
        self.device = torch.device("cpu")
        self.big = 2**40

    def forward(self, x: Tensor) -> Tensor:
        if self.color == Color.BLUE:
            return x * self.number
        return x + self.w.sum()


def traced(module: nn.Module, *inputs: Tensor) -> bytes:
    with torch.no_grad():
        return saved(torch.jit.trace(module.eval(), inputs, check_trace=False))


def scripted(module: nn.Module) -> bytes:
    return saved(torch.jit.script(module.eval()))


def saved(module) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def read(data: bytes) -> Layout:
    return read_layout(io.BytesIO(data))


WORDS = torch.arange(6).reshape(2, 3)
EXPORTS = {
    "traced encoder": lambda seed: traced(Encoder(seed), WORDS),
    "scripted encoder": lambda seed: scripted(Encoder(seed)),
    "scripted oddities": lambda seed: scripted(Odd()),
    "traced network": lambda seed: traced(
        torch.manual_seed(seed) and nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
        torch.ones(1, 1, 5, 5),
    ),
    "lstm": lambda seed: traced(torch.manual_seed(seed) and nn.LSTM(3, 4, 2), torch.ones(2, 1, 3)),
    "constant": lambda seed: traced(torch.manual_seed(seed) and Shifted(0.5), torch.ones(1, 3)),
    "half": lambda seed: traced(
        torch.manual_seed(seed) and nn.Linear(3, 4).bfloat16(), torch.ones(1, 3).bfloat16()
    ),
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_slots_are_the_tensors_of_the_loaded_module(kind):
    """Each slot, made into a view of its block, is what `torch.jit.load` puts there; none is
    missing."""
    data = EXPORTS[kind](0)
    layout = read(data)
    assert layout.obstacle is None
    module = torch.jit.load(io.BytesIO(data))
    pointers = set()
    for slot in layout.slots:
        # By the inner module: `half` is a method of the outer one.
        tensor = reduce(lambda owner, name: owner.getattr(name), slot.path, module._c)
        block = layout.blocks[slot.block]
        content = bytearray(data[block.offset : block.offset + block.nbytes])
        dtype = getattr(torch, slot.dtype)
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        view = flat.as_strided(slot.shape, slot.stride, slot.start)
        assert tensor.dtype == dtype
        assert tensor.stride() == slot.stride
        assert torch.equal(tensor, view), slot
        pointers.add(tensor.data_ptr())
    named = [*module.parameters(), *module.buffers()]
    assert {tensor.data_ptr() for tensor in named} <= pointers


@pytest.mark.parametrize("kind", EXPORTS)
def test_exports_of_one_process_are_one_architecture(kind):
    """torch counts class names over all that a process exports; the architecture does not."""
    layouts = [read(EXPORTS[kind](seed)) for seed in range(4)]
    assert len({layout.architecture for layout in layouts}) == 1
    assert len({layout.slots for layout in layouts}) == 1
    assert [b.nbytes for b in layouts[0].blocks] == [b.nbytes for b in layouts[1].blocks]


def test_different_models_are_different_architectures():
    """Width, a constant, an attribute, tracing or scripting: each is another program."""
    layouts = [
        read(data)
        for data in (
            *(export(0) for export in EXPORTS.values()),
            traced(Encoder(width=4), WORDS),
            scripted(Odd(Color.BLUE)),
            scripted(Odd(text="b")),
            scripted(Odd(number=2)),
            traced(Shifted(0.25), torch.ones(1, 3)),
            traced(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)), torch.ones(1, 3)),
            traced(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2)), torch.ones(1, 3)),
            traced(nn.LayerNorm(3, eps=1e-5), torch.ones(1, 3)),
            traced(nn.LayerNorm(3, eps=1e-6), torch.ones(1, 3)),
        )
    ]
    keys = [layout.architecture for layout in layouts]
    assert len(set(keys)) == len(keys)


def test_tied_weights_are_two_slots_over_one_block():
    """The embedding and the head of the encoder are one storage."""
    layout = read(traced(Encoder(), WORDS))
    blocks = {slot.path: slot.block for slot in layout.slots}
    assert blocks["words", "weight"] == blocks["head", "weight"]
    assert len(layout.blocks) < len(layout.slots)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class Remembering(nn.Module):
    seen: List[Tensor]  # noqa: UP006 — TorchScript knows this

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x


def test_models_that_write_may_write():
    """State in a buffer or in a list, and batch norm that trains."""
    norm = nn.BatchNorm1d(3)
    with torch.no_grad():
        trains = saved(torch.jit.trace(norm.train(), torch.rand(4, 3), check_trace=False))
    for data in (scripted(Counting()), scripted(Remembering()), trains):
        assert read(data).may_write
    for data in (traced(Encoder(), WORDS), traced(norm, torch.rand(4, 3)), scripted(Odd())):
        assert not read(data).may_write


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w

    @torch.jit.export
    def __getstate__(self):
        return (self.w, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]):
        self.w = state[0]
        self.training = state[1]


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.tensors = [torch.ones(3), torch.ones(4)]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tensors[0]


def test_what_cannot_be_taken_apart_says_why():
    """A `__setstate__`, tensors in a list and sparse ones are left to torch."""
    sparse = Odd()
    sparse.half = torch.eye(3).to_sparse()
    for data, reason in (
        (scripted(Stateful()), "__setstate__"),
        (scripted(Listed()), "list, dict, tuple"),
        (scripted(sparse), "_rebuild_sparse"),
    ):
        layout = read(data)
        assert reason in str(layout.obstacle)
        assert layout.may_write


def test_a_module_loaded_and_saved_again_is_the_same():
    """Going through torch once more changes names, not the program."""
    data = traced(Encoder(), WORDS)
    again = saved(torch.jit.load(io.BytesIO(data)))
    assert read(data).slots == read(again).slots
    assert [b.digest for b in read(data).blocks] == [b.digest for b in read(again).blocks]
