"""Which bytes of which slab are free: arithmetic alone, no memory.

A tier of memory consists of slabs, each one large allocation, within which blocks are placed.
The laws: blocks do not overlap; every place begins and ends at a multiple of `ALIGNMENT`; free
neighbours are always joined; no slab is made that the budget does not allow.

A group of blocks (a model) is planned as a whole, so that a "no" changes nothing. Its blocks
are kept in order and together where that is possible, since what lies together is copied at
once; where it is not, they go wherever there is room: fragmentation costs copies, not models.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from shared.layout import ALIGNMENT, aligned

_MOST_SLABS: Final = 16
_LEAST_SLAB: Final = 32 << 20
_GREATEST_SLAB: Final = 256 << 20
_MOST_RUNS: Final = 16
"""Into about as many runs a group may be cut before a new slab is preferred: a copy more costs
some ten microseconds, a hole that is not used costs bytes for as long as it stays."""


class Place(NamedTuple):
    """Bytes of a slab. No bytes are nowhere, in a slab that does not exist."""

    slab: int
    offset: int
    nbytes: int
    """A multiple of `ALIGNMENT`."""


NOWHERE: Final = Place(0, 0, 0)


class Plan(NamedTuple):
    """Where a group of blocks would stand, and what must be done before: in this order."""

    drop: tuple[int, ...]
    """Empty slabs to give back, because a larger one is needed."""
    make: tuple[tuple[int, int], ...]
    """New slabs: number and bytes."""
    places: tuple[Place, ...]
    """One for each size that was asked for, in that order."""


class NoRoom(NamedTuple):
    """A "no" with its numbers, all in bytes."""

    need: int
    free: int
    """In slabs, as far as the budget allows."""
    largest: int
    """The largest piece of these."""
    unreserved: int
    """What further slabs may take."""

    def __str__(self) -> str:
        return (
            f"needs {self.need:,} bytes: {self.free:,} are free, at most {self.largest:,} of "
            f"them in one piece, and {self.unreserved:,} more may be reserved"
        )


class Space:
    """Not thread-safe. All figures are bytes."""

    def __init__(self, budget_bytes: int, slab_bytes: int | None = None) -> None:
        self.budget_bytes = 0
        """Of the slabs together. What is in use may be beyond it after it was lowered."""
        self.limit(budget_bytes)
        if slab_bytes is None:
            slab_bytes = self.budget_bytes // _MOST_SLABS
            slab_bytes = min(max(slab_bytes, _LEAST_SLAB), _GREATEST_SLAB)
        self.slab_bytes = aligned(slab_bytes)
        self.used_bytes = 0
        self.reserved_bytes = 0
        """In slabs, used or not."""
        self.slab_sizes: dict[int, int] = {}
        self._holes: dict[int, list[tuple[int, int]]] = {}
        """By slab, in order: offset and bytes."""
        self._last_slab = NOWHERE.slab

    # --- deciding

    def plan(self, sizes: Sequence[int]) -> Plan | NoRoom:
        """Places for blocks of these sizes, in the order in which they are best kept. Changes
        nothing."""
        needs = [aligned(size) for size in sizes]
        wanted = [index for index, need in enumerate(needs) if need]
        total = sum(needs)
        if self.used_bytes + total <= self.budget_bytes:
            for least in (min(total // _MOST_RUNS, self.slab_bytes // 4), 1):
                draft = _Draft(self)
                if draft.place_in_runs(needs, wanted, least):
                    return draft.plan(needs)
            draft = _Draft(self)
            if draft.place_scattered(needs, wanted):
                return draft.plan(needs)
        free = max(min(self.reserved_bytes, self.budget_bytes) - self.used_bytes, 0)
        largest = max((nbytes for _, _, nbytes in self.holes()), default=0)
        unreserved = max(self.budget_bytes - self.reserved_bytes, 0)
        return NoRoom(total, free, min(largest, free), unreserved)

    def holes(self) -> Iterator[tuple[int, int, int]]:
        """Slab, offset and bytes of everything that is free."""
        for slab, holes in self._holes.items():
            for offset, nbytes in holes:
                yield slab, offset, nbytes

    def empty_slabs(self) -> dict[int, int]:
        """Slabs that hold nothing, with their bytes."""
        return {
            slab: nbytes
            for slab, nbytes in self.slab_sizes.items()
            if self._holes[slab] == [(0, nbytes)]
        }

    @property
    def next_slab(self) -> int:
        """The number of the next new slab; numbers are never used twice."""
        return self._last_slab + 1

    # --- doing

    def limit(self, budget_bytes: int) -> None:
        """Another budget from now on."""
        self.budget_bytes = max(budget_bytes, 0) // ALIGNMENT * ALIGNMENT

    def add(self, slab: int, nbytes: int) -> None:
        assert slab > self._last_slab, f"slab {slab} is not new"
        assert self.reserved_bytes + nbytes <= self.budget_bytes, "over the budget"
        self._last_slab = slab
        self.slab_sizes[slab] = nbytes
        self._holes[slab] = [(0, nbytes)]
        self.reserved_bytes += nbytes

    def drop(self, slab: int) -> None:
        """Only an empty one."""
        nbytes = self.slab_sizes.pop(slab)
        assert self._holes.pop(slab) == [(0, nbytes)], f"slab {slab} is in use"
        self.reserved_bytes -= nbytes

    def take(self, place: Place) -> None:
        """As planned."""
        if not place.nbytes:
            return
        holes = self._holes[place.slab]
        index = bisect.bisect(holes, (place.offset + 1,)) - 1
        assert index >= 0, f"{place} is not free"
        offset, nbytes = holes[index]
        end, hole_end = place.offset + place.nbytes, offset + nbytes
        assert end <= hole_end, f"{place} is not free"
        rest = [(offset, place.offset - offset), (end, hole_end - end)]
        holes[index : index + 1] = [hole for hole in rest if hole[1]]
        self.used_bytes += place.nbytes

    def free(self, place: Place) -> None:
        """Gives back what was taken."""
        if not place.nbytes:
            return
        holes, start, end = self._holes[place.slab], place.offset, place.offset + place.nbytes
        index = bisect.bisect(holes, (start, 0))
        first = last = index
        if index and sum(holes[index - 1]) >= start:
            first, start = index - 1, holes[index - 1][0]
            assert sum(holes[first]) == place.offset, f"{place} was free already"
        if index < len(holes) and holes[index][0] <= end:
            assert holes[index][0] == end, f"{place} was free already"
            last, end = index + 1, sum(holes[index])
        holes[first:last] = [(start, end - start)]
        self.used_bytes -= place.nbytes

    def validate(self) -> None:
        """Recomputes the laws of this module's header; raises `AssertionError`."""
        assert self.reserved_bytes == sum(self.slab_sizes.values())
        free = 0
        for slab, nbytes in self.slab_sizes.items():
            before = -1
            for offset, size in self._holes[slab]:
                assert offset > before, f"holes of slab {slab} overlap or are not joined"
                assert size > 0, f"an empty hole in slab {slab}"
                assert offset % ALIGNMENT == size % ALIGNMENT == 0, "a hole is not aligned"
                before = offset + size
                free += size
            assert before <= nbytes, f"a hole reaches beyond slab {slab}"
        assert self.used_bytes + free == self.reserved_bytes

    def __repr__(self) -> str:
        return (
            f"<Space {self.used_bytes:,} of {self.reserved_bytes:,} bytes used in "
            f"{len(self.slab_sizes)} slabs, budget {self.budget_bytes:,}>"
        )


class _Draft:
    """A plan in the making: the holes as they would be."""

    def __init__(self, space: Space) -> None:
        self._slab_bytes = space.slab_bytes
        self._unreserved = space.budget_bytes - space.reserved_bytes
        self._untouched = space.empty_slabs()
        self._holes = sorted((nbytes, slab, offset) for slab, offset, nbytes in space.holes())
        """By size."""
        self._numbers = itertools.count(space.next_slab)
        self._drop: list[int] = []
        self._make: list[tuple[int, int]] = []
        self._places: dict[int, Place] = {}

    def plan(self, needs: Sequence[int]) -> Plan:
        places = tuple(self._places.get(index, NOWHERE) for index in range(len(needs)))
        return Plan(tuple(self._drop), tuple(self._make), places)

    def place_in_runs(self, needs: Sequence[int], wanted: Sequence[int], least: int) -> bool:
        """Neighbours stay neighbours in as few runs as the holes allow, none under `least` bytes
        unless it is the last or a new slab's. False when they do not fit like that."""
        ends = list(itertools.accumulate(needs[index] for index in wanted))
        at = done = 0
        while at < len(wanted):
            # 1. The smallest hole that takes all of the rest, else the largest that there is.
            hole = self._smallest(ends[-1] - done)
            if hole is None and self._holes:
                hole = len(self._holes) - 1
            until = at if hole is None else bisect.bisect(ends, done + self._holes[hole][0])
            # 2. A new slab where that takes too little.
            taken = ends[until - 1] - done if until > at else 0
            if until < len(wanted) and taken < least:
                hole = self._grow(needs[wanted[at]], may_drop=not taken)
                if hole is None:
                    return False
                until = bisect.bisect(ends, done + self._holes[hole][0])
            # 3. As many as fit, one after the other.
            assert hole is not None, "there is a hole for the rest"
            nbytes = ends[until - 1] - done
            slab, offset, _ = self._carve(hole, nbytes)
            for index in wanted[at:until]:
                self._places[index] = Place(slab, offset, needs[index])
                offset += needs[index]
            at, done = until, done + nbytes
        return True

    def place_scattered(self, needs: Sequence[int], wanted: Sequence[int]) -> bool:
        """Each block by itself, the largest first, each into the smallest hole that takes it."""
        for index in sorted(wanted, key=lambda index: -needs[index]):
            hole = self._smallest(needs[index])
            if hole is None:
                hole = self._grow(needs[index], may_drop=True)
            if hole is None:
                return False
            self._places[index] = self._carve(hole, needs[index])
        return True

    def _smallest(self, nbytes: int) -> int | None:
        """Index of the smallest hole of at least so many bytes."""
        index = bisect.bisect_left(self._holes, (nbytes,))
        return index if index < len(self._holes) else None

    def _carve(self, hole: int, nbytes: int) -> Place:
        size, slab, offset = self._holes.pop(hole)
        if size > nbytes:
            bisect.insort(self._holes, (size - nbytes, slab, offset + nbytes))
        self._untouched.pop(slab, None)
        return Place(slab, offset, nbytes)

    def _grow(self, nbytes: int, *, may_drop: bool) -> int | None:
        """Index of a hole that is a whole new slab with room for a block of so many bytes. Empty
        slabs that are too small for it may make way where the budget demands it."""
        for slab, size in sorted(self._untouched.items(), key=lambda item: -item[1]):
            if self._unreserved >= nbytes or not may_drop:
                break
            self._drop.append(slab)
            self._unreserved += size
            self._holes.remove((size, slab, 0))
            del self._untouched[slab]
        if self._unreserved < nbytes:
            return None
        wanted = self._slab_bytes
        if nbytes > wanted:  # its own slab, with little beyond it
            step = aligned(self._slab_bytes // _MOST_SLABS)
            wanted = -(-nbytes // step) * step
        size = min(wanted, self._unreserved)
        self._unreserved -= size
        slab = next(self._numbers)
        self._make.append((slab, size))
        bisect.insort(self._holes, (size, slab, 0))
        return self._holes.index((size, slab, 0))


def joined(pairs: Iterable[tuple[Place, Place]]) -> list[tuple[Place, Place]]:
    """Copies from the first to the second of each pair, with those made one whose ends meet on
    both sides. Both of a pair have as many bytes; the order of the pairs is kept."""
    runs: list[tuple[Place, Place]] = []
    from_slab = from_start = from_end = to_slab = to_start = to_end = -1
    for (slab, start, nbytes), (other, other_start, _) in pairs:
        if not nbytes:
            continue
        if (slab, start, other, other_start) != (from_slab, from_end, to_slab, to_end):
            if from_end > from_start:
                runs.append(_run(from_slab, from_start, to_slab, to_start, from_end - from_start))
            from_slab, from_start, from_end = slab, start, start
            to_slab, to_start, to_end = other, other_start, other_start
        from_end += nbytes
        to_end += nbytes
    if from_end > from_start:
        runs.append(_run(from_slab, from_start, to_slab, to_start, from_end - from_start))
    return runs


def merged(places: Iterable[Place]) -> list[Place]:
    """The same bytes in as few places as their order allows."""
    return [place for place, _ in joined((place, place) for place in places)]


def _run(slab: int, start: int, other: int, other_start: int, nbytes: int) -> tuple[Place, Place]:
    return Place(slab, start, nbytes), Place(other, other_start, nbytes)
