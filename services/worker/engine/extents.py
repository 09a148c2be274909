"""Which bytes of a tier of memory are free: arithmetic alone, no memory.

A tier is one line of addresses, as long as its budget may be. Only those *grains* of it that
blocks stand on are backed by memory. The laws: blocks do not overlap; every place begins and
ends at a multiple of `ALIGNMENT`; free neighbours are always joined; nothing is placed beyond
the budget; and **what the bytes suffice for is never refused**: a tensor cannot be cut, so where
no hole takes a block, others are moved towards the beginning of the line until one does.

A group of blocks (a model) is planned as a whole, so that a "no" changes nothing. Its blocks
are kept in order and together where that is possible, since what lies together is copied at
once; where it is not, they go wherever there is room; blocks are moved last of all, and as few
bytes of them as will do.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from services.worker.engine.places import NOWHERE, Move, Place
from services.worker.engine.squeeze import Holes, Line, taken
from shared.layout import ALIGNMENT, aligned

LEAST_GRAIN: Final = 2 << 20
"""A huge page of a host, and what a CUDA device maps at least."""
_GREATEST_GRAIN: Final = 16 << 20
_MOST_GRAINS: Final = 2048
"""More cost time to back, fewer cost bytes: on either side of a hole up to a grain is backed for
nothing."""


class Plan(NamedTuple):
    """Where a group of blocks would stand, and what must be done before."""

    moves: tuple[Move, ...]
    """In this order: none writes where one that is still to be moved stands."""
    places: tuple[Place, ...]
    """One for each size that was asked for, in that order."""


class NoRoom(NamedTuple):
    """A "no" with its numbers, both in bytes."""

    need: int
    free: int

    def __str__(self) -> str:
        return f"needs {self.need:,} bytes: {self.free:,} are free"


def grain_for(budget_bytes: int) -> int:
    """How much is backed at once: what is backed and not used stays below a thousandth of a
    large budget for each hole, and is no more than two huge pages in a small one."""
    wanted = budget_bytes // _MOST_GRAINS // LEAST_GRAIN * LEAST_GRAIN
    return min(max(wanted, LEAST_GRAIN), _GREATEST_GRAIN)


class Space:
    """Not thread-safe. All figures are bytes."""

    def __init__(self, most_bytes: int, grain: int | None = None) -> None:
        """`most_bytes`: of the budget, now and ever."""
        self.most_bytes: Final = max(most_bytes, 0) // ALIGNMENT * ALIGNMENT
        self.budget_bytes = self.most_bytes
        """Nothing is placed beyond; what is may be there after it was lowered."""
        self.grain: Final = aligned(grain_for(most_bytes) if grain is None else grain)
        self.used_bytes = 0
        self.reserved_bytes = 0
        """In grains that are backed, used or not."""
        self._holes = [(0, self.most_bytes)] if self.most_bytes else []
        """In order: offset and bytes."""
        self._used: dict[int, int] = {}
        """Of every backed grain."""
        self.empty: dict[int, None] = {}
        """Backed grains that hold nothing."""

    # --- deciding

    def plan(self, sizes: Sequence[int]) -> Plan | NoRoom:
        """Places for blocks of these sizes, in the order in which they are best kept. Changes
        nothing. No only when all that is free is too little."""
        needs = [aligned(size) for size in sizes]
        wanted = [index for index, need in enumerate(needs) if need]
        total = sum(needs)
        if self.used_bytes + total > self.budget_bytes:
            return NoRoom(total, max(self.budget_bytes - self.used_bytes, 0))
        if not wanted:
            return Plan((), (NOWHERE,) * len(needs))
        # 1. What stands beyond a budget that was lowered falls below it first.
        line, holes = None, self._holes
        if self._end() > self.budget_bytes:
            line = Line(self._holes, self.most_bytes, self.budget_bytes)
            line.fall()
            holes = line.holes()
        elif self.budget_bytes < self.most_bytes:
            holes = _within(holes, self.budget_bytes)
        # 2. In the holes that there are.
        for way in (_in_runs, _scattered):
            found = way(holes, needs, wanted)
            if found is not None:
                places = tuple(found.get(index, NOWHERE) for index in range(len(needs)))
                return Plan(tuple(line.moves()) if line is not None else (), places)
        # 3. In holes that are made.
        line = line or Line(self._holes, self.most_bytes, self.budget_bytes)
        line.squeeze_in({index: needs[index] for index in wanted})
        found = line.newcomers()
        places = tuple(found.get(index, NOWHERE) for index in range(len(needs)))
        return Plan(tuple(line.moves()), places)

    def unbacked(self, place: Place) -> Iterator[Place]:
        """The stretches of grains under this place that are not backed."""
        missing = (grain for grain in self.grains(place) if grain not in self._used)
        return self.stretches(missing)

    def grains(self, place: Place) -> range:
        if not place.nbytes:
            return range(0)
        return range(place.offset // self.grain, (place.end - 1) // self.grain + 1)

    def stretches(self, grains: Iterable[int]) -> Iterator[Place]:
        """Grains, in their order, as bytes; neighbours as one."""
        joint = itertools.groupby(enumerate(grains), key=lambda pair: pair[1] - pair[0])
        for _, pairs in joint:
            members = [grain for _, grain in pairs]
            start = members[0] * self.grain
            end = min((members[-1] + 1) * self.grain, self.most_bytes)
            yield Place(start, end - start)

    # --- doing

    def limit(self, budget_bytes: int) -> None:
        """Another budget from now on."""
        nbytes = max(budget_bytes, 0) // ALIGNMENT * ALIGNMENT
        self.budget_bytes = min(nbytes, self.most_bytes)

    def back(self, stretch: Place) -> None:
        """Of `unbacked`."""
        for grain in self.grains(stretch):
            assert grain not in self._used, f"grain {grain} is backed"
            self._used[grain] = 0
            self.empty[grain] = None
        self.reserved_bytes += stretch.nbytes

    def give_back(self, stretch: Place) -> None:
        """Of those that are `empty`."""
        for grain in self.grains(stretch):
            del self.empty[grain]
            assert not self._used.pop(grain), f"grain {grain} is in use"
        self.reserved_bytes -= stretch.nbytes

    def take(self, place: Place) -> None:
        """As planned, on grains that are backed."""
        if not place.nbytes:
            return
        holes = self._holes
        index = bisect.bisect(holes, (place.offset + 1,)) - 1
        assert index >= 0, f"{place} is not free"
        offset, nbytes = holes[index]
        hole_end = offset + nbytes
        assert place.end <= hole_end, f"{place} is not free"
        rest = [(offset, place.offset - offset), (place.end, hole_end - place.end)]
        holes[index : index + 1] = [hole for hole in rest if hole[1]]
        self._count(place, 1)

    def free(self, place: Place) -> None:
        """Gives back what was taken."""
        if not place.nbytes:
            return
        holes, start, end = self._holes, place.offset, place.end
        index = bisect.bisect(holes, (start, 0))
        first = last = index
        if index and sum(holes[index - 1]) >= start:
            first, start = index - 1, holes[index - 1][0]
            assert sum(holes[first]) == place.offset, f"{place} was free already"
        if index < len(holes) and holes[index][0] <= end:
            assert holes[index][0] == end, f"{place} was free already"
            last, end = index + 1, sum(holes[index])
        holes[first:last] = [(start, end - start)]
        self._count(place, -1)

    def _count(self, place: Place, sign: int) -> None:
        self.used_bytes += sign * place.nbytes
        for grain in self.grains(place):
            start = grain * self.grain
            part = min(place.end, start + self.grain) - max(place.offset, start)
            self._used[grain] += sign * part
            if self._used[grain]:
                self.empty.pop(grain, None)
            else:
                self.empty[grain] = None

    def _end(self) -> int:
        """Where the last block ends."""
        if self._holes and sum(self._holes[-1]) == self.most_bytes:
            return self._holes[-1][0]
        return self.most_bytes

    def validate(self) -> None:
        """Recomputes the laws of this module's header; raises `AssertionError`."""
        before, free = -1, 0
        for offset, size in self._holes:
            assert offset > before, "holes overlap or are not joined"
            assert size > 0, "an empty hole"
            assert offset % ALIGNMENT == size % ALIGNMENT == 0, "a hole is not aligned"
            before, free = offset + size, free + size
        assert before <= self.most_bytes, "a hole reaches beyond the line"
        assert self.used_bytes + free == self.most_bytes
        used: dict[int, int] = dict.fromkeys(self._used, 0)
        for offset, size in taken(self._holes, self.most_bytes):
            for grain in self.grains(Place(offset, size)):
                start = grain * self.grain
                used[grain] += min(offset + size, start + self.grain) - max(offset, start)
        assert used == self._used, "a grain is in use and not backed, or counted wrongly"
        assert self.empty.keys() == {grain for grain, nbytes in used.items() if not nbytes}
        backed = self.stretches(sorted(used))
        assert self.reserved_bytes == sum(stretch.nbytes for stretch in backed)

    def __repr__(self) -> str:
        return (
            f"<Space {self.used_bytes:,} of {self.reserved_bytes:,} bytes used in "
            f"{len(self._used)} grains, budget {self.budget_bytes:,}>"
        )


def _within(holes: Holes, end: int) -> list[tuple[int, int]]:
    return [(offset, min(nbytes, end - offset)) for offset, nbytes in holes if offset < end]


def _in_runs(holes: Holes, needs: Sequence[int], wanted: Sequence[int]) -> dict[int, Place] | None:
    """Neighbours stay neighbours, in as few runs as the holes allow: in the smallest hole that
    takes all of the rest, else in the largest that there is. None when they do not fit so."""
    by_size = sorted((nbytes, offset) for offset, nbytes in holes)
    ends = list(itertools.accumulate(needs[index] for index in wanted))
    places: dict[int, Place] = {}
    at = done = 0
    while at < len(wanted):
        if not by_size:
            return None
        hole = min(bisect.bisect_left(by_size, (ends[-1] - done,)), len(by_size) - 1)
        nbytes, offset = by_size.pop(hole)
        until = bisect.bisect(ends, done + nbytes)
        if until == at:
            return None
        for index in wanted[at:until]:
            places[index] = Place(offset, needs[index])
            offset += needs[index]
        left = nbytes - (ends[until - 1] - done)
        if left:
            bisect.insort(by_size, (left, offset))
        at, done = until, ends[until - 1]
    return places


def _scattered(
    holes: Holes, needs: Sequence[int], wanted: Sequence[int]
) -> dict[int, Place] | None:
    """Each block by itself, the largest first, each in the smallest hole that takes it. None
    when that fails."""
    by_size = sorted((nbytes, offset) for offset, nbytes in holes)
    places: dict[int, Place] = {}
    for index in sorted(wanted, key=lambda index: -needs[index]):
        hole = bisect.bisect_left(by_size, (needs[index],))
        if hole == len(by_size):
            return None
        nbytes, offset = by_size.pop(hole)
        places[index] = Place(offset, needs[index])
        if nbytes > needs[index]:
            bisect.insort(by_size, (nbytes - needs[index], offset + needs[index]))
    return places
