"""A region of a CUDA device's addresses, which its driver backs piece by piece, as torch's own
expandable segments do it. Torch does not know of this memory: whoever asks for a region tells
torch's allocator how much it has to leave (`Account`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

from services.worker.engine.extents import LEAST_GRAIN
from services.worker.engine.failures import Failed
from services.worker.engine.places import Place
from services.worker.engine.regions import Typed

_OUT_OF_MEMORY: Final = 2
_PINNED: Final = 1
_ON_DEVICE: Final = 1
_READ_AND_WRITE: Final = 3


class Account(Protocol):
    """Whoever knows what else takes of the device."""

    def outside_torch(self, nbytes: int) -> None:
        """So many bytes more (or fewer) are taken, or are about to be, that torch does not
        know of."""

    def reclaim(self) -> None:
        """Gives back what torch keeps and nobody refers to."""


class _Location(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("number", ctypes.c_int))


class _Flags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("remote", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", _Flags),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class Driver:
    """The driver's calls, by number of the device. Each tells its error number, 0 for none; other
    threads run meanwhile."""

    def __init__(self, number: int, library: Any | None = None) -> None:
        self._cuda = library if library is not None else ctypes.CDLL("libcuda.so.1")
        location = _Location(_ON_DEVICE, number)
        self._properties = _Properties(_PINNED, 0, location, None, _Flags())
        self._access = _Access(location, _READ_AND_WRITE)

    def reserve(self, nbytes: int) -> tuple[int, int]:
        """Addresses alone: the error and the first of them."""
        address = ctypes.c_uint64()
        size, none = ctypes.c_size_t(nbytes), ctypes.c_uint64(0)
        error = self._cuda.cuMemAddressReserve(
            ctypes.byref(address), size, ctypes.c_size_t(0), none, none
        )
        return int(error), address.value

    def create(self, nbytes: int) -> tuple[int, int]:
        """Memory without an address: the error and its handle."""
        handle = ctypes.c_uint64()
        error = self._cuda.cuMemCreate(
            ctypes.byref(handle),
            ctypes.c_size_t(nbytes),
            ctypes.byref(self._properties),
            ctypes.c_uint64(0),
        )
        return int(error), handle.value

    def map(self, address: int, nbytes: int, handle: int) -> int:
        at, size, none = ctypes.c_uint64(address), ctypes.c_size_t(nbytes), ctypes.c_uint64(0)
        zero = ctypes.c_size_t(0)
        error = int(self._cuda.cuMemMap(at, size, zero, ctypes.c_uint64(handle), none))
        if not error:
            one = ctypes.c_size_t(1)
            error = int(self._cuda.cuMemSetAccess(at, size, ctypes.byref(self._access), one))
            if error:
                self.unmap(address, nbytes)
        return error

    def unmap(self, address: int, nbytes: int) -> int:
        return int(self._cuda.cuMemUnmap(ctypes.c_uint64(address), ctypes.c_size_t(nbytes)))

    def release(self, handle: int) -> int:
        """The memory goes once nothing is mapped to it."""
        return int(self._cuda.cuMemRelease(ctypes.c_uint64(handle)))


def _as_tensor(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    class Lent:
        __cuda_array_interface__: Final = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }

    with torch.inference_mode(mode=False):
        return torch.as_tensor(Lent(), device=device)


class CudaRegion:
    """Raises `Failed` with `resource_exhausted` when the driver refuses even the addresses."""

    def __init__(
        self,
        nbytes: int,
        grain: int,
        device: torch.device,
        account: Account,
        driver: Driver | None = None,
        as_tensor: Callable[[int, int, torch.device], torch.Tensor] = _as_tensor,
    ) -> None:
        """`grain`: a multiple of what the device maps at least."""
        assert not grain % LEAST_GRAIN
        self.nbytes = nbytes
        self._grain = grain
        self._device = device
        self._account = account
        self._driver = driver or Driver(device.index or 0)
        self._as_tensor = as_tensor
        whole = -(-max(nbytes, 1) // grain) * grain
        error, self._address = self._driver.reserve(whole)
        if error:
            raise _refused(whole, error)
        self._handles: dict[int, int] = {}
        self._typed: Typed | None = None

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        if self._typed is None:
            # Torch asks the driver whose address this is, who tells only of what is backed.
            assert 0 in self._handles, "the first grain is the first to be used"
            self._typed = Typed(self._as_tensor(self._address, self.nbytes, self._device))
        return self._typed(dtype)

    def back(self, place: Place) -> None:
        for start in range(place.offset, place.end, self._grain):
            error = self._back(start)
            if error == _OUT_OF_MEMORY:  # perhaps torch keeps what it does not use
                self._account.reclaim()
                error = self._back(start)
            if error:
                self.give_back(Place(place.offset, start - place.offset))
                raise _refused(place.nbytes, error)

    def _back(self, start: int) -> int:
        self._account.outside_torch(self._grain)
        error, handle = self._driver.create(self._grain)
        if not error:
            error = self._driver.map(self._address + start, self._grain, handle)
            if error:
                self._driver.release(handle)
        if error:
            self._account.outside_torch(-self._grain)
        else:
            self._handles[start] = handle
        return error

    def give_back(self, place: Place) -> None:
        for start in range(place.offset, place.end, self._grain):
            self._driver.unmap(self._address + start, self._grain)
            self._driver.release(self._handles.pop(start))
            self._account.outside_torch(-self._grain)


def _refused(nbytes: int, error: int) -> Failed:
    why = f"CUDA error {error}"
    return Failed("resource_exhausted", f"no {nbytes:,} bytes of the device's memory: {why}")
