from __future__ import annotations

import hashlib

from shared.layout.model import Block, Slot, aligned
from shared.layout.shares import MAX_SHARES, find_shares


def model(*tensors: tuple[str, str, int]):
    """Blocks and slots from (path, content, bytes)."""
    blocks, slots = [], []
    for path, content, nbytes in tensors:
        slots.append(Slot(tuple(path.split(".")), len(blocks), "uint8", 0, (nbytes,), (1,)))
        blocks.append(Block(hashlib.sha256(content.encode()).digest(), 0, nbytes))
    return blocks, slots


def layers(count: int, *, trained: int = 0, head: str = "head"):
    """A model of `count` equal layers, of which the last few were trained."""
    backbone = [
        (f"encoder.{i}.{part}.w", f"{i}{part}{head if i >= count - trained else ''}", 100_000)
        for i in range(count)
        for part in ("attention", "dense")
    ]
    return model(*backbone, ("head.w", head, 5_000))


def keys(parts) -> set[str]:
    return {share.key for share in find_shares(*parts)}


def test_fine_tunes_agree_on_what_they_did_not_train():
    """Models with one backbone share all of it but the layers that were trained."""
    one, other = keys(layers(8)), keys(layers(8, trained=2, head="other"))
    assert len(one) == 16
    assert len(one & other) == 12


def test_there_are_few_shares():
    """A model of many parts is divided at a higher place in its tree."""
    shares = find_shares(*layers(20))
    assert len(shares) == 20
    assert {share.nbytes for share in shares} == {2 * aligned(100_000)}
    assert len(find_shares(*layers(40))) == 1
    assert all(len(find_shares(*layers(count))) <= MAX_SHARES for count in range(1, 60))


def test_small_parts_are_the_models_own():
    """What is below a hundredth of the weights is not counted apart."""
    shares = find_shares(*layers(4))
    assert sum(share.nbytes for share in shares) == 8 * aligned(100_000)


def test_the_same_content_twice_is_one_share():
    """Two equal parts of a model are named once, so that nobody counts it as shared with itself."""
    parts = model(("a.w", "same", 1000), ("b.w", "same", 1000))
    assert len(find_shares(*parts)) == 1


def test_nothing_has_no_shares():
    """A model without tensors, or with empty ones, shares nothing."""
    assert find_shares([], []) == ()
    assert find_shares(*model(("w", "", 0))) == ()
