from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.regions import HostRegion  # noqa: E402
from services.worker.engine.views import Spot, check, views  # noqa: E402
from shared.layout import Block, Layout, Slot  # noqa: E402

pytestmark = pytest.mark.torch


def layout(slot: Slot, nbytes: int = 48) -> Layout:
    return Layout(blocks=(Block(b"", 0, nbytes),), slots=(slot,))


def slot(dtype="float32", start=0, shape=(3, 4), stride=(4, 1), block=0) -> Slot:
    return Slot(("layer", "weight"), block, dtype, start, shape, stride)


@pytest.mark.parametrize(
    "bad",
    [
        slot(start=1),
        slot(start=-1),
        slot(block=1),
        slot(block=-1),
        slot(dtype="float64"),
        slot(stride=(5, 1)),
        slot(stride=(4, -1)),
        slot(shape=(3, -4)),
        slot(shape=(3,)),
        slot(shape=(0, 4), start=13),
    ],
)
def test_a_view_beyond_its_block_is_refused(bad):
    """It would show the weights of another model, or crash the engine."""
    with pytest.raises(Failed, match=r"layer\.weight reaches beyond its block") as error:
        check(layout(bad))
    assert error.value.code == "model_failed"


@pytest.mark.parametrize("name", ["nn", "float33", "load"])
def test_an_unknown_dtype_is_refused(name):
    """A dtype's name is looked up in torch, and nothing else is found there."""
    with pytest.raises(Failed, match="unknown type"):
        check(layout(slot(dtype=name)))


def test_a_block_of_less_than_nothing_is_refused():
    """Whatever a layout says, the arithmetic stays right."""
    with pytest.raises(Failed, match="less than no bytes"):
        check(Layout(blocks=(Block(b"", 0, -1),)))


@pytest.mark.parametrize(
    ("dtype", "start", "shape", "stride"),
    [
        ("float32", 0, (3, 4), (4, 1)),
        ("float32", 0, (4, 3), (1, 4)),
        ("float32", 2, (2, 3), (5, 2)),
        ("float32", 11, (), ()),
        ("float32", 12, (0, 7), (7, 1)),
        ("float32", 0, (5, 4), (0, 1)),
        ("bfloat16", 3, (21,), (1,)),
        ("complex64", 1, (5,), (1,)),
        ("bool", 40, (8,), (1,)),
        ("int64", 0, (6,), (1,)),
    ],
)
def test_a_view_shows_what_torch_would_show(dtype, start, shape, stride):
    """Transposed, strided, expanded, scalar and empty tensors of every width."""
    region = HostRegion.whole(2048)
    region.typed(torch.uint8).copy_(torch.arange(2048) % 2)
    tested = layout(slot(dtype, start, shape, stride))
    (view,) = views(tested, check(tested), [Spot(region.typed, 1024)])
    block = region.typed(torch.uint8)[1024 : 1024 + 48].clone()
    expected = block.view(getattr(torch, dtype)).as_strided(shape, stride, start)
    assert torch.equal(view, expected)
    assert view.dtype == expected.dtype
    assert view.stride() == expected.stride()
    assert not view.requires_grad
