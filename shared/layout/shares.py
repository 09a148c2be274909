"""Which parts of a model's weights other models may have too."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from shared.layout.model import Block, Share, Slot, aligned

MAX_SHARES: Final = 32
MIN_SHARE: Final = 0.01
"""Of the weights. Below it, a part is not worth being counted apart."""


def find_shares(blocks: Sequence[Block], slots: Sequence[Slot]) -> tuple[Share, ...]:
    """One for each large part of the module tree, as deep down as leaves few enough of them.

    A part is a prefix of the path to a module, so that fine-tunes which trained the same
    layers agree on the rest.
    """
    paths: dict[int, tuple[str, ...]] = {}
    for slot in slots:
        paths.setdefault(slot.block, slot.path[:-1])
    groups: dict[tuple[str, ...], list[Block]] = {}
    for depth in range(1 + max((len(path) for path in paths.values()), default=0)):
        finer = _group(blocks, paths, depth)
        if finer is None:
            break
        groups = finer
    least = MIN_SHARE * sum(aligned(block.nbytes) for block in blocks)
    # By key: a part that the model has twice is kept once, and the second of them is its own.
    shares = {share.key: share for share in map(_share, groups.values())}
    return tuple(share for share in shares.values() if share.nbytes and share.nbytes >= least)


def _group(
    blocks: Sequence[Block], paths: dict[int, tuple[str, ...]], depth: int
) -> dict[tuple[str, ...], list[Block]] | None:
    """None when there are too many parts so deep down."""
    groups: dict[tuple[str, ...], list[Block]] = {}
    for block, path in paths.items():
        groups.setdefault(path[:depth], []).append(blocks[block])
        if len(groups) > MAX_SHARES:
            return None
    return groups


def _share(blocks: Sequence[Block]) -> Share:
    key = hashlib.sha256()
    for block in blocks:
        key.update(block.digest + block.nbytes.to_bytes(8, "little"))
    return Share(key.hexdigest()[:16], sum(aligned(block.nbytes) for block in blocks))
