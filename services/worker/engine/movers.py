"""How bytes get into slabs: from files and from other slabs. While they move, no thread is kept
from the interpreter.

Moves are ordered one by one and are done when `finish` returns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch

from services.worker.engine.extents import Place, joined
from services.worker.engine.files import Piece, ScatteredFile
from services.worker.engine.slabs import HostSlab, Slab
from shared.layout import ALIGNMENT, aligned

_STAGING_BYTES: Final = 16 << 20
"""Of each half. A copy of so much takes a device's link long enough to hide what starting it
costs, and the memory is the engine's for good."""


class Read(NamedTuple):
    """A stretch of a file, and the slab and offset to which it goes."""

    offset: int
    nbytes: int
    slab: Slab
    place: Place


class Mover(Protocol):
    def copy(self, source: HostSlab, at: Place, target: Slab, to: Place) -> None:
        """From the host's memory to the device's; both places have as many bytes."""

    def read(self, file: ScatteredFile, reads: Sequence[Read]) -> None:
        """From a file to the device's memory. Raises `Failed` as the file does."""

    def finish(self) -> None:
        """All that was ordered is done."""


def read_to_host(file: ScatteredFile, reads: Sequence[Read]) -> None:
    """From a file into the host's memory, with nothing between. Raises `Failed` as it does."""

    def pieces() -> Iterator[Piece]:
        for offset, nbytes, slab, place in reads:
            assert isinstance(slab, HostSlab)
            yield Piece(offset, slab.view[place.offset : place.offset + nbytes])

    file.read_pieces(pieces())


class CpuMover:
    """The device's memory is the host's."""

    def copy(self, source: HostSlab, at: Place, target: Slab, to: Place) -> None:
        assert isinstance(target, HostSlab)
        assert at.nbytes == to.nbytes
        assert at.offset + at.nbytes <= source.nbytes
        assert to.offset + to.nbytes <= target.nbytes
        # Not `copy_`: that would start a team of threads for the copier, beside those which
        # compute.
        ctypes.memmove(target.address + to.offset, source.address + at.offset, to.nbytes)

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

    def copy(self, source: HostSlab, at: Place, target: Slab, to: Place) -> None:
        with torch.cuda.stream(self._stream):
            _flat(target, to).copy_(_flat(source, at), non_blocking=True)

    def read(self, file: ScatteredFile, reads: Sequence[Read]) -> None:
        if self._staging is None:
            halves = [HostSlab(_STAGING_BYTES, pin_for=self._device) for _ in range(2)]
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
    """Host slabs by turns: one is filled from the file while the others are copied from."""

    def __init__(
        self,
        slabs: Sequence[HostSlab],
        copy: Callable[[HostSlab, Place, Slab, Place], None],
        mark: Callable[[], Callable[[], None]],
    ) -> None:
        self._slabs = slabs
        self._copy = copy
        self._mark = mark
        self._waits: list[Callable[[], None] | None] = [None] * len(slabs)
        self._turn = 0

    def read(self, file: ScatteredFile, reads: Sequence[Read]) -> None:
        room = min(slab.nbytes for slab in self._slabs)
        for fill in fills(reads, room):
            turn, slab = self._turn, self._slabs[self._turn]
            self._turn = (turn + 1) % len(self._slabs)
            # 1. What was copied from here is over.
            if (wait := self._waits[turn]) is not None:
                wait()
            # 2. Fill it, each stretch where the one before ends.
            staged, places, end = [], [], 0
            targets = {each.place.slab: each.slab for each in fill}
            for each in fill:
                at = Place(0, end, each.place.nbytes)
                staged.append(Read(each.offset, each.nbytes, slab, at))
                places.append((at, each.place))
                end += each.place.nbytes
            read_to_host(file, staged)
            # 3. Copy it on, what lies together at once.
            for at, to in joined(places):
                self._copy(slab, at, targets[to.slab], to)
            self._waits[turn] = self._mark()


def fills(reads: Sequence[Read], room: int) -> Iterator[list[Read]]:
    """The same bytes in lots of at most `room` (a multiple of `ALIGNMENT`), in the same order;
    what is larger than the rest of a lot is cut."""
    assert room >= ALIGNMENT
    assert room % ALIGNMENT == 0
    lot: list[Read] = []
    left = room
    for offset, nbytes, slab, place in reads:
        done = 0
        while done < nbytes:
            count = min(nbytes - done, left)
            piece = Place(place.slab, place.offset + done, aligned(count))
            lot.append(Read(offset + done, count, slab, piece))
            done += count
            left -= piece.nbytes
            if not left:
                yield lot
                lot, left = [], room
    if lot:
        yield lot


def _flat(slab: Slab, place: Place) -> torch.Tensor:
    return slab.typed(torch.uint8)[place.offset : place.offset + place.nbytes]


def mover_for(device: torch.device) -> Mover:
    return CudaMover(device) if device.type == "cuda" else CpuMover()
