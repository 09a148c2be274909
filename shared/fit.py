"""The one question of memory, asked alike by placer (planning and verifying) and worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from shared.models import Footprint


class Refusal(msgspec.Struct, frozen=True, gc=False):
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
    held = list(residents)
    weights = sum([each.weights_bytes for each in held])
    workspace = max([each.workspace_bytes for each in held], default=0)
    seen: set[str] = set()
    for shares in [each.shares for each in held if each.shares]:
        for share in shares:
            if share.key in seen:
                weights -= share.nbytes
            seen.add(share.key)
    return weights + workspace


def fit(newcomer: Footprint, residents: Iterable[Footprint], budget_bytes: int) -> Refusal | None:
    """None when `newcomer` fits on the device beside `residents`, else why not."""
    held = tuple(residents)
    before = used_bytes(held)
    after = used_bytes((*held, newcomer))
    if after <= budget_bytes:
        return None
    alone = used_bytes((newcomer,))
    if alone > budget_bytes:
        return Refusal("larger than the whole device budget", alone, budget_bytes)
    return Refusal("no room on the device", after - before, max(budget_bytes - before, 0))


def fit_tiers(
    newcomer: Footprint, assigned: Iterable[Footprint], budget_bytes: int, host_bytes: int
) -> Refusal | None:
    """None when `newcomer` may be assigned beside `assigned`, else why not.

    Not all that is assigned must be on the device at once: a worker with a host tier of
    `host_bytes` swaps. Together they must fit both tiers; what no copy can be held of must fit
    the device, as without a host tier, or each request could cost a load from the disk; and the
    greatest must fit the device beside those that never leave it, or it could never run.
    """
    others = tuple(assigned)
    everyone = (*others, newcomer)
    if can_be_served(everyone, budget_bytes, host_bytes):
        return None
    refusal = fit(newcomer, others, budget_bytes)
    assert refusal is not None, "what fits on the device can be served"
    alone = used_bytes((newcomer,))
    if not host_bytes or alone > budget_bytes:
        return refusal
    before, after = used_bytes(others), used_bytes(everyone)
    total = budget_bytes + host_bytes
    if after > total:
        reason = "no room on the device and in the host's memory"
        return Refusal(reason, after - before, max(total - before, 0))
    bound, all_bound = used_bytes(_bound(others)), used_bytes(_bound(everyone))
    if all_bound > budget_bytes:
        reason = "no room on the device for what cannot wait in the host's memory"
        return Refusal(reason, (all_bound - bound) or alone, max(budget_bytes - bound, 0))
    pinned = used_bytes(each for each in others if each.pinned)
    reason = "no room on the device beside what never leaves it"
    return Refusal(reason, alone, max(budget_bytes - pinned, 0))


def can_be_served(assigned: Iterable[Footprint], budget_bytes: int, host_bytes: int) -> bool:
    """Whether one worker can serve all of these: `fit_tiers`, asked of the whole."""
    everyone = tuple(assigned)
    used = used_bytes(everyone)
    if used <= budget_bytes:
        return True
    if not host_bytes or used > budget_bytes + host_bytes:
        return False
    if used_bytes(_bound(everyone)) > budget_bytes:
        return False
    pinned = used_bytes(each for each in everyone if each.pinned)
    largest = max((used_bytes((each,)) for each in everyone if not each.pinned), default=0)
    return pinned + largest <= budget_bytes


def _bound(models: Iterable[Footprint]) -> Iterator[Footprint]:
    """Those that count on the device alone."""
    return (each for each in models if each.pinned or not each.copyable)
