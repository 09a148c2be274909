"""Places on a line of addresses, and what joins them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple


class Place(NamedTuple):
    """Bytes of the line. No bytes are nowhere."""

    offset: int
    nbytes: int
    """A multiple of `ALIGNMENT`."""

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


NOWHERE: Final = Place(0, 0)


class Move(NamedTuple):
    """Bytes that go towards the beginning; the two may overlap."""

    source: Place
    target: Place


def joined(pairs: Iterable[tuple[Place, Place]]) -> list[tuple[Place, Place]]:
    """Copies from the first to the second of each pair, with those made one whose ends meet on
    both sides. Both of a pair have as many bytes; the order of the pairs is kept."""
    runs: list[tuple[Place, Place]] = []
    start = end = other_start = other_end = -1
    for (offset, nbytes), (other, _) in pairs:
        if not nbytes:
            continue
        if (offset, other) != (end, other_end):
            if end > start:
                runs.append((Place(start, end - start), Place(other_start, end - start)))
            start = end = offset
            other_start = other_end = other
        end += nbytes
        other_end += nbytes
    if end > start:
        runs.append((Place(start, end - start), Place(other_start, end - start)))
    return runs


def merged(places: Iterable[Place]) -> list[Place]:
    """The same bytes in as few places as their order allows."""
    return [place for place, _ in joined((place, place) for place in places)]
