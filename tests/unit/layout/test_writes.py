from __future__ import annotations

import time

import pytest

from shared.layout.writes import OUTPUTS, PURE_NAMESPACES, WRITERS, may_write

NORM = "    y = torch.batch_norm(x, w, b, {}, {}, 0.1, 1e-05, True)\n"


@pytest.mark.parametrize(
    "line",
    [
        "    _0 = torch.add_(x, 1)\n",
        "    _0 = (x).copy_(y)\n",
        "    self.n = x\n",
        "    (self.bn).n = torch.add(x, 1)\n",
        "    _0 = torch.append(self.seen, x)\n",
        "    _0 = torch._set_item(self.seen, 0, x)\n",
        "    _0 = torch.add(x, y, alpha=1, out=self.w)\n",
        '    setattr(self, "0", x)\n',
        "    _0 = torch.embedding_renorm_(w, x, 1., 2.)\n",
        "    _0 = ops.mine.frobnicate(x)\n",
        "    _0 = torch.__iand__(x, y)\n",
        "    _0 = __torch__.torch.classes.a.B.__new__(__torch__.torch.classes.a.B)\n",
        NORM.format("m, v", "True"),
        NORM.format("m, v", "training"),
        NORM.format("None, v", "True"),
        "    y = torch.instance_norm(x, w, b, m, v, True, 0.1, 1e-05, True)\n",
        "    y = torch.batch_norm(x, w\n",
        "    _0 = torch.add_ (x, 1)\n",
        "    _0 = torch.append (self.seen, x)\n",
        "    _0 = torch.add(x, y, alpha=1, out = z)\n",
        "    self.n, y = f(x)\n",
        "    self.n=x\n",
        "    x[0] = y\n",
        "    x += y\n",
        """    y = '"' + torch.foo(x) + '"'\n""",
        '    y = """ " """ + x + """ " """\n',
        '    y = f("a\\\n    b") + g("c")\n',
        '    y = f("a\n',
        "    y = torch.batch_norm(" + "x" * 2000 + ", w, b, m, v, False, 0.1)\n",
    ],
)
def test_what_writes_is_found(line):
    """In place, to an attribute, to a keyword, to a list, in an operator that nobody knows."""
    assert may_write([f"  def forward(self, x: Tensor) -> Tensor:\n{line}"])


@pytest.mark.parametrize(
    "line",
    [
        "    _0 = torch.add(x, 1)\n",
        "    weight = self.weight\n",
        "    x = torch.linear(x, (self.a).w, b)\n",
        "    x = torch.__and__(x, y)\n",
        '    ops.prim.RaiseException("self.n = x, add_(x)")\n',
        "    n = ops.prim.NumToTensor(torch.size(x, 1))\n",
        "    y = ops.torchvision.nms(x, s, 0.5)\n",
        NORM.format("m, v", "False"),
        NORM.format("None, None", "True"),
        NORM.format("torch.add(m, f(a, b)), [v, v][0]", "False"),
        "    y = torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-05, True)\n",
    ],
)
def test_what_only_reads_is_passed(line):
    """The code of an ordinary model in eval mode needs no analysis."""
    attributes = (
        '  __parameters__ = ["a", ]\n  eps : Final[float] = 1.0\n  __annotations__["0"] = A\n'
    )
    head = f"class M(Module):\n{attributes}  def __init__(self, x: Tensor) -> Tensor:\n"
    assert not may_write([head + line])


@pytest.mark.torch
def test_every_operator_of_torch_that_writes_is_known():
    """Whatever torch declares to write to an argument is found by its name or its keyword."""
    import torch

    for schema in torch._C._jit_get_all_schemas():
        written = [a for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        namespace, _, name = schema.name.partition("::")
        if not written or namespace not in PURE_NAMESPACES:
            continue
        keywords = "".join(f", {a.name}=x" for a in written if a.kwarg_only)
        assert name in WRITERS or may_write([f"    y = torch.{name}(x{keywords})\n"]), schema


@pytest.mark.parametrize(
    "text",
    [
        "torch.batch_norm(" * 100_000,
        " " * 2_000_000,
        '"' + "\\" * 2_000_000,
        "a" * 2_000_000,
        " " + "." * 2_000_000,
        '"\\' * 1_000_000,
    ],
)
def test_odd_text_costs_no_time(text):
    """The time is that of reading, whatever the text is made of."""
    started = time.monotonic()
    may_write([text])
    assert time.monotonic() - started < 5


def test_the_lists_are_sound():
    """No keyword that ordinary calls bear is taken for an output."""
    assert OUTPUTS.isdisjoint({"dtype", "device", "alpha", "bias", "weight", "layout", "dim"})
