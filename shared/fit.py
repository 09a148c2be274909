"""The one question of memory, asked alike by placer (planning and verifying) and worker."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shared.models import Footprint


class Refusal(msgspec.Struct, frozen=True):
    """A "no" with its reason and its numbers."""

    reason: str
    need_bytes: int = 0
    free_bytes: int = 0

    def __str__(self) -> str:
        if not self.need_bytes:
            return self.reason
        return f"{self.reason}: needs {self.need_bytes:,} bytes, {self.free_bytes:,} are free"


def used_bytes(residents: Iterable[Footprint]) -> int:
    """Bytes that these models take together on one device.

    Weights add up, what several models share once; workspaces do not: one batch runs at a
    time, so the device needs room for the greatest workspace once.
    """
    weights = workspace = 0
    seen: set[str] = set()
    for footprint in residents:
        weights += footprint.weights_bytes
        workspace = max(workspace, footprint.workspace_bytes)
        for share in footprint.shares:
            if share.key in seen:
                weights -= share.nbytes
            seen.add(share.key)
    return weights + workspace


def fit(newcomer: Footprint, residents: Iterable[Footprint], budget_bytes: int) -> Refusal | None:
    """None when `newcomer` fits beside `residents`, else why not."""
    held = tuple(residents)
    before = used_bytes(held)
    after = used_bytes((*held, newcomer))
    if after <= budget_bytes:
        return None
    alone = used_bytes((newcomer,))
    if alone > budget_bytes:
        return Refusal("larger than the whole device budget", alone, budget_bytes)
    return Refusal("no room on the device", after - before, max(budget_bytes - before, 0))
