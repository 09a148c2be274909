"""Large pieces of memory, each one allocation: of the host by `mmap`, so that giving one back
really gives its pages back, of a CUDA device by torch.

No page of a slab faults when it is written: a fault per 4 KiB takes five times as long as the
copy itself. Making and giving back slabs leaves the interpreter to other threads.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from typing import Final, Protocol

import torch

from services.worker.engine.failures import Failed
from services.worker.engine.pinning import pin, unpin

HUGE_PAGE: Final = 2 << 20
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


class Slab(Protocol):
    """So many bytes of a device or of the host."""

    nbytes: int

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it as one flat tensor."""

    def release(self) -> None:
        """Gives the memory back; nobody looks at it any more."""


class Typed:
    """The slab's tensor as each dtype. Kept, since every view of a model begins with one."""

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


class HostSlab:
    """Host memory, every page there from the start. With `pin_for`, registered with that CUDA
    device, which then copies from it by itself and while others compute. Where the system
    refuses to pin it, it serves unpinned.

    Raises `Failed` with `resource_exhausted` when the system has no more.
    """

    def __init__(self, nbytes: int, *, pin_for: torch.device | None = None) -> None:
        self.nbytes = nbytes
        # A huge page needs an address that is a multiple of its size: a little more is mapped
        # (not taken: pages outside the slab are never written), and the slab begins at one.
        try:
            mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _exhausted(nbytes, "host", error.strerror or "mmap refused") from None
        with torch.inference_mode(mode=False):
            skip = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE
            # The tensor keeps the mapping alive; the last of both to go unmaps it.
            tensor = torch.frombuffer(mapping, dtype=torch.uint8, offset=skip, count=nbytes)
        self.view = memoryview(mapping)[skip : skip + nbytes]
        self.address = tensor.data_ptr()
        self.typed = Typed(tensor)
        self._fault_in()
        self._pinned_for = None
        if pin_for is not None and pin(self.address, nbytes, pin_for):
            self._pinned_for = pin_for

    def _fault_in(self) -> None:
        # Not beyond the end, which would take a whole huge page for a part of one.
        _madvise(self.address, self.nbytes // HUGE_PAGE * HUGE_PAGE, _MADV_HUGEPAGE)
        for start in range(0, self.nbytes, _STEP):
            at, count = self.address + start, min(_STEP, self.nbytes - start)
            if not _madvise(at, count, _MADV_POPULATE_WRITE):
                continue
            if ctypes.get_errno() == errno.ENOMEM:
                raise _exhausted(self.nbytes, "host", "every page of the machine is taken")
            ctypes.memset(at, 0, count)  # an older system: fault by fault

    def release(self) -> None:
        device = self._pinned_for
        if device is None or unpin(self.address, self.nbytes, device):
            # The pages go even if somebody kept a view, who then reads zeros.
            _madvise(self.address, self.nbytes, _MADV_DONTNEED)
        del self.view, self.typed


class CudaSlab:
    """Memory of a CUDA device. Raises `Failed` with `resource_exhausted` when it has no more.

    What is released stays in torch's cache, where torch finds it before it refuses anybody
    anything; the system gets it with `give_back`.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        try:
            with torch.inference_mode(mode=False):
                tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise _exhausted(nbytes, "device", str(error)) from None
        # Torch may hand out memory that work on this stream still uses: fit for whoever comes
        # next on the same stream. Slabs are written to from others.
        torch.cuda.current_stream(device).synchronize()
        self.typed = Typed(tensor)

    def release(self) -> None:
        del self.typed

    @staticmethod
    def give_back() -> None:
        """Returns what was released to the system. Not for every slab: torch can only drop all
        of its cache, what batches take again and again included, and each `cudaFree` waits for
        the device. What remains of that comes once per lull. (A memory pool for slabs alone
        would spare the batches' cache, not the wait.)"""
        torch.cuda.empty_cache()


def _exhausted(nbytes: int, whose: str, why: str) -> Failed:
    return Failed("resource_exhausted", f"no {nbytes:,} bytes of the {whose}'s memory: {why}")
