"""How bytes get into a tier: from files and from the other tier; and how they are moved within
one. While they move, no thread is kept from the interpreter.

Moves are ordered one by one and are done when `finish` returns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch

from services.worker.engine.files import Piece, ScatteredFile
from services.worker.engine.places import Move, Place, joined
from services.worker.engine.regions import HostRegion, Region
from shared.layout import ALIGNMENT, aligned

_STAGING_BYTES: Final = 16 << 20
"""Of each half. A copy of so much takes a device's link long enough to hide what starting it
costs, and the memory is the engine's for good."""
_BOUNCE_BYTES: Final = 4 << 20
"""Of the device's own. What moves by less than its length goes through it, piece by piece."""


class Read(NamedTuple):
    """A stretch of a file, and the region and the place to which it goes."""

    offset: int
    nbytes: int
    region: Region
    place: Place


class Mover(Protocol):
    def copy(self, source: HostRegion, at: Place, target: Region, to: Place) -> None:
        """From the host's memory to the device's; both places have as many bytes."""

    def move(self, region: Region, moves: Sequence[Move]) -> None:
        """Within the device's memory, in this order."""

    def read(self, file: ScatteredFile, reads: Sequence[Read]) -> None:
        """From a file to the device's memory. Raises `Failed` as the file does."""

    def finish(self) -> None:
        """All that was ordered is done."""


def read_to_host(file: ScatteredFile, reads: Sequence[Read]) -> None:
    """From a file into the host's memory, with nothing between. Raises `Failed` as it does."""

    def pieces() -> Iterator[Piece]:
        for offset, nbytes, region, place in reads:
            assert isinstance(region, HostRegion)
            yield Piece(offset, region.view[place.offset : place.offset + nbytes])

    file.read_pieces(pieces())


def move_in_host(region: Region, moves: Sequence[Move]) -> None:
    """Within the host's memory, in this order."""
    assert isinstance(region, HostRegion)
    for source, target in moves:
        # It may overlap; `memmove` knows.
        at, to = region.address + source.offset, region.address + target.offset
        ctypes.memmove(to, at, source.nbytes)


class CpuMover:
    """The device's memory is the host's."""

    def copy(self, source: HostRegion, at: Place, target: Region, to: Place) -> None:
        assert isinstance(target, HostRegion)
        assert at.nbytes == to.nbytes
        assert at.end <= source.nbytes
        assert to.end <= target.nbytes
        # Not `copy_`: that would start a team of threads for the copier, beside those which
        # compute.
        ctypes.memmove(target.address + to.offset, source.address + at.offset, to.nbytes)

    def move(self, region: Region, moves: Sequence[Move]) -> None:
        move_in_host(region, moves)

    def read(self, file: ScatteredFile, reads: Sequence[Read]) -> None:
        read_to_host(file, reads)

    def finish(self) -> None:
        pass


class CudaMover:
    """A stream of its own, beside those that compute."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        new_stream: Any = torch.cuda.Stream  # torch leaves it untyped
        self._stream = new_stream(device)
        self._staging: Staging | None = None
        self._bounce: torch.Tensor | None = None

    def copy(self, source: HostRegion, at: Place, target: Region, to: Place) -> None:
        with torch.cuda.stream(self._stream):
            for part in parts(at, source.grain):
                there = Place(to.offset + part.offset - at.offset, part.nbytes)
                _flat(target, there).copy_(_flat(source, part), non_blocking=True)

    def move(self, region: Region, moves: Sequence[Move]) -> None:
        with torch.cuda.stream(self._stream):
            if self._bounce is None:
                # On this stream, on which alone it is used.
                self._bounce = torch.empty(_BOUNCE_BYTES, dtype=torch.uint8, device=self._device)
            for source, target in moves:
                move_by_pieces(_flat(region, Place(0, source.end)), source, target, self._bounce)

    def read(self, file: ScatteredFile, reads: Sequence[Read]) -> None:
        if self._staging is None:
            halves = [HostRegion.whole(_STAGING_BYTES, pin_for=self._device) for _ in range(2)]
            self._staging = Staging(halves, self.copy, self._mark)
        self._staging.read(file, reads)

    def finish(self) -> None:
        self._stream.synchronize()

    def _mark(self) -> Callable[[], None]:
        """To be called to wait for what is ordered now."""
        new_event: Any = torch.cuda.Event  # torch leaves it untyped
        event = new_event()
        event.record(self._stream)
        wait: Callable[[], None] = event.synchronize
        return wait


class Staging:
    """Host regions by turns: one is filled from the file while the others are copied from."""

    def __init__(
        self,
        regions: Sequence[HostRegion],
        copy: Callable[[HostRegion, Place, Region, Place], None],
        mark: Callable[[], Callable[[], None]],
    ) -> None:
        self._regions = regions
        self._copy = copy
        self._mark = mark
        self._waits: list[Callable[[], None] | None] = [None] * len(regions)
        self._turn = 0

    def read(self, file: ScatteredFile, reads: Sequence[Read]) -> None:
        room = min(region.nbytes for region in self._regions)
        for fill in fills(reads, room):
            turn, region = self._turn, self._regions[self._turn]
            self._turn = (turn + 1) % len(self._regions)
            # 1. What was copied from here is over.
            if (wait := self._waits[turn]) is not None:
                wait()
            # 2. Fill it, each stretch where the one before ends.
            staged, places, end = [], [], 0
            for each in fill:
                at = Place(end, each.place.nbytes)
                staged.append(Read(each.offset, each.nbytes, region, at))
                places.append((at, each.place))
                end += each.place.nbytes
            read_to_host(file, staged)
            # 3. Copy it on, what lies together at once.
            for at, to in joined(places):
                self._copy(region, at, fill[0].region, to)
            self._waits[turn] = self._mark()


def fills(reads: Sequence[Read], room: int) -> Iterator[list[Read]]:
    """The same bytes, all of one region, in lots of at most `room` (a multiple of `ALIGNMENT`),
    in the same order; what is larger than the rest of a lot is cut."""
    assert room >= ALIGNMENT
    assert room % ALIGNMENT == 0
    lot: list[Read] = []
    left = room
    for offset, nbytes, region, place in reads:
        done = 0
        while done < nbytes:
            count = min(nbytes - done, left)
            piece = Place(place.offset + done, aligned(count))
            lot.append(Read(offset + done, count, region, piece))
            done += count
            left -= piece.nbytes
            if not left:
                yield lot
                lot, left = [], room
    if lot:
        yield lot


def parts(place: Place, grain: int) -> Iterator[Place]:
    """The same bytes, cut where grains end: a device does not copy at once from memory that was
    registered with it in parts."""
    start = place.offset
    while start < place.end:
        end = min((start // grain + 1) * grain, place.end)
        yield Place(start, end - start)
        start = end


def move_by_pieces(flat: torch.Tensor, source: Place, target: Place, bounce: torch.Tensor) -> None:
    """Towards the beginning of a flat tensor of bytes, where the two may overlap: no copy reads
    what it writes, and none writes what a later one has to read."""
    by = source.offset - target.offset
    # Pieces no longer than the way do not reach what they come from.
    step, through = (by, None) if by >= bounce.numel() else (bounce.numel(), bounce)
    for done in range(0, source.nbytes, step):
        count = min(step, source.nbytes - done)
        piece = flat[source.offset + done :][:count]
        if through is not None:
            piece = through[:count].copy_(piece)
        flat[target.offset + done :][:count].copy_(piece)


def _flat(region: Region, place: Place) -> torch.Tensor:
    return region.typed(torch.uint8)[place.offset : place.end]


def mover_for(device: torch.device) -> Mover:
    return CudaMover(device) if device.type == "cuda" else CpuMover()
