"""Large regions of addresses, backed by memory grain by grain: of the host by `mmap`, so that
giving back really gives pages back, of a CUDA device by its driver's virtual memory.

So what lies together in addresses may come and go in parts, and no page faults when it is
written: a fault per 4 KiB takes five times as long as the copy itself. Backing and giving back
leave the interpreter to other threads.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from typing import Final, Protocol

import torch

from services.worker.engine.extents import LEAST_GRAIN
from services.worker.engine.failures import Failed
from services.worker.engine.pinning import pin, unpin
from services.worker.engine.places import Place

HUGE_PAGE: Final = LEAST_GRAIN
_MAP_NORESERVE: Final = 0x4000
_MADV_DONTNEED: Final = 4
_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14."""
_STEP: Final = 8 << 20
"""Of faulting in. The system keeps the process from mapping memory meanwhile, which a thread that
allocates a large tensor would feel."""

# Called by ctypes, which lets other threads run meanwhile; `mmap.madvise` does not.
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise.restype = ctypes.c_int


class Region(Protocol):
    """So many bytes of a device's addresses, or of the host's."""

    nbytes: int

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it as one flat tensor, of which only what is backed may be touched."""

    def back(self, place: Place) -> None:
        """Whole grains (the last one of the region may be less). Raises `Failed` with
        `resource_exhausted` when the system has no more; none of these bytes is backed then."""

    def give_back(self, place: Place) -> None:
        """Of what is backed; nobody looks at it any more."""


class Typed:
    """The region's tensor as each dtype. Kept, since every view of a model begins with one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._by_dtype: dict[torch.dtype, torch.Tensor] = {}

    def __call__(self, dtype: torch.dtype) -> torch.Tensor:
        known = self._by_dtype.get(dtype)
        if known is None:
            # Views of an inference tensor would be such as well, and no module takes those.
            with torch.inference_mode(mode=False):
                known = self._tensor.view(dtype)
            self._by_dtype[dtype] = known
        return known


class HostRegion:
    """Host memory. With `pin_for`, each grain that is backed is registered with that CUDA device,
    which then copies from it by itself and while others compute. Where the system refuses to pin
    it, it serves unpinned.

    Raises `Failed` with `resource_exhausted` when the system has not even the addresses.
    """

    def __init__(self, nbytes: int, grain: int, *, pin_for: torch.device | None = None) -> None:
        self.nbytes = nbytes
        self.grain = grain
        # A huge page needs an address that is a multiple of its size: a little more is mapped
        # (not taken: pages outside are never written), and the region begins at one.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=flags)
        except OSError as error:
            raise _exhausted(nbytes, "host", error.strerror or "mmap refused") from None
        with torch.inference_mode(mode=False):
            begin = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
            skip = -begin % HUGE_PAGE
            # The tensor keeps the mapping alive; the last of both to go unmaps it. It is no part
            # of a larger one: views of it count from its first byte.
            tensor = torch.empty(0, dtype=torch.uint8)
            if nbytes:
                tensor = torch.frombuffer(mapping, dtype=torch.uint8, offset=skip, count=nbytes)
        self.view = memoryview(mapping)[skip : skip + nbytes]
        self.address = begin + skip
        self.typed = Typed(tensor)
        if not grain % HUGE_PAGE:
            # Not beyond the end, which would take a whole huge page for a part of one.
            _madvise(self.address, nbytes // HUGE_PAGE * HUGE_PAGE, _MADV_HUGEPAGE)
        self._pin_for = pin_for
        self._pinned: set[int] = set()

    @classmethod
    def whole(cls, nbytes: int, *, pin_for: torch.device | None = None) -> HostRegion:
        """One grain, backed."""
        region = cls(nbytes, nbytes, pin_for=pin_for)
        region.back(Place(0, nbytes))
        return region

    def back(self, place: Place) -> None:
        try:
            for start in range(place.offset, place.end, _STEP):
                self._fault_in(start, min(_STEP, place.end - start))
        except Failed:
            self.give_back(place)
            raise
        if self._pin_for is not None:
            for start in range(place.offset, place.end, self.grain):
                count = min(self.grain, place.end - start)
                if pin(self.address + start, count, self._pin_for):
                    self._pinned.add(start)

    def _fault_in(self, start: int, count: int) -> None:
        at = self.address + start
        if not _madvise(at, count, _MADV_POPULATE_WRITE):
            return
        if ctypes.get_errno() == errno.ENOMEM:
            raise _exhausted(count, "host", "every page of the machine is taken")
        ctypes.memset(at, 0, count)  # an older system: fault by fault

    def give_back(self, place: Place) -> None:
        for start in range(place.offset, place.end, self.grain):
            at, count = self.address + start, min(self.grain, place.end - start)
            if start in self._pinned:
                assert self._pin_for is not None
                if not unpin(at, count, self._pin_for):
                    continue
                self._pinned.discard(start)
            # The pages go even if somebody kept a view, who then reads zeros.
            _madvise(at, count, _MADV_DONTNEED)


def _exhausted(nbytes: int, whose: str, why: str) -> Failed:
    return Failed("resource_exhausted", f"no {nbytes:,} bytes of the {whose}'s memory: {why}")
