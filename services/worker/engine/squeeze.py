"""A line of addresses as it would be after moves: where no hole takes a block, others are moved
towards the beginning until one does. Arithmetic alone, as in extents.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.worker.engine.places import Move, Place

Holes = Sequence[tuple[int, int]]
"""In order: offset and bytes."""


def taken(holes: Holes, end: int) -> Iterator[tuple[int, int]]:
    """What lies between the holes: offset and bytes."""
    at = 0
    for offset, nbytes in (*holes, (end, 0)):
        if offset > at:
            yield at, offset - at
        at = offset + nbytes


class _Item:
    """What stands together, and where from it comes; or a newcomer."""

    __slots__ = ("index", "nbytes", "offset", "origin")

    def __init__(self, offset: int, nbytes: int, index: int | None = None) -> None:
        self.offset = self.origin = offset
        self.nbytes = nbytes
        self.index = index
        """Of a newcomer, which costs nothing to move: its bytes are not there yet."""


class Line:
    """The line as it would be after moves, all towards its beginning and past nobody."""

    def __init__(self, holes: Holes, most_bytes: int, budget_bytes: int) -> None:
        self._items = [_Item(*taken) for taken in taken(holes, most_bytes)]
        self._end = budget_bytes

    def fall(self) -> None:
        """Nothing stands beyond the budget, by moving as few at the end as will do."""
        end = self._end
        for first in range(len(self._items) - 1, -1, -1):
            end -= self._items[first].nbytes
            if (
                self._items[first - 1].offset + self._items[first - 1].nbytes if first else 0
            ) <= end:
                self._close_ranks(first, len(self._items))
                return
        raise AssertionError("all of it is more than the budget")

    def squeeze_in(self, needs: dict[int, int]) -> None:
        """All of these, the largest first. Together they are no more than what is free, so there
        is always a stretch whose holes make one that is large enough."""
        for index, need in sorted(needs.items(), key=lambda item: -item[1]):
            at = self._gap(need)
            self._items.insert(at, _Item(self._begin(at), need, index))

    def holes(self) -> list[tuple[int, int]]:
        return [(start, nbytes) for start, nbytes in self._gaps() if nbytes > 0]

    def moves(self) -> Iterator[Move]:
        for item in self._items:
            if item.index is None and item.offset != item.origin:
                yield Move(Place(item.origin, item.nbytes), Place(item.offset, item.nbytes))

    def newcomers(self) -> dict[int, Place]:
        return {
            item.index: Place(item.offset, item.nbytes)
            for item in self._items
            if item.index is not None
        }

    def _gaps(self) -> list[tuple[int, int]]:
        """Before each item, and behind the last: offset and bytes, also where there are none."""
        gaps, at = [], 0
        for item in self._items:
            gaps.append((at, item.offset - at))
            at = item.offset + item.nbytes
        return [*gaps, (at, self._end - at)]

    def _gap(self, need: int) -> int:
        """Before which item there is a hole of so many bytes now: the smallest that there was,
        or one made of neighbours with as few bytes as possible between them."""
        gaps = [nbytes for _, nbytes in self._gaps()]
        fitting = [(nbytes, at) for at, nbytes in enumerate(gaps) if nbytes >= need]
        if fitting:
            return min(fitting)[1]
        best: tuple[int, int, int] | None = None
        free = cost = first = 0
        for last, nbytes in enumerate(gaps):
            free += nbytes
            cost += self._cost(last - 1) if last else 0
            while free - gaps[first] >= need:
                free -= gaps[first]
                cost -= self._cost(first)
                first += 1
            if free >= need and (best is None or cost < best[0]):
                best = cost, first, last
        assert best is not None, "all that is free is enough"
        self._close_ranks(*best[1:])
        return best[2]

    def _begin(self, at: int) -> int:
        """Where an item can begin at the earliest."""
        return self._items[at - 1].offset + self._items[at - 1].nbytes if at else 0

    def _cost(self, at: int) -> int:
        item = self._items[at]
        return item.nbytes if item.index is None else 0

    def _close_ranks(self, first: int, last: int) -> None:
        """Items of this range stand one after the other, from where the one before them ends."""
        at = self._begin(first)
        for item in self._items[first:last]:
            item.offset = at
            at += item.nbytes
