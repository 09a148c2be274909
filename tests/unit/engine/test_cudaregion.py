from __future__ import annotations

import ctypes

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.cudaregion import CudaRegion, Driver  # noqa: E402
from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.places import Place  # noqa: E402

pytestmark = pytest.mark.torch

GRAIN = 2 << 20
CUDA = torch.device("cuda", 0)


class Library:
    """libcuda of a device with memory for so many grains, of which torch keeps some."""

    def __init__(self, grains: int, torchs: int = 0):
        self.left, self.torchs = grains - torchs, torchs
        self.handles: set[int] = set()
        self.mapped: dict[int, int] = {}
        self.refuses_access = False
        self.outside = 0
        self._last = 0

    # --- of the driver

    def cuMemAddressReserve(self, address, size, alignment, hint, flags):  # noqa: N802
        address._obj.value = 1 << 40
        self.reserved = size.value
        return 0

    def cuMemCreate(self, handle, size, properties, flags):  # noqa: N802
        assert (properties._obj.kind, properties._obj.location.kind) == (1, 1)
        assert size.value == GRAIN
        if not self.left:
            return 2
        self.left -= 1
        self._last += 1
        handle._obj.value = self._last
        self.handles.add(self._last)
        return 0

    def cuMemMap(self, address, size, offset, handle, flags):  # noqa: N802
        assert address.value not in self.mapped
        assert not address.value % size.value
        self.mapped[address.value] = handle.value
        return 0

    def cuMemSetAccess(self, address, size, access, count):  # noqa: N802
        assert address.value in self.mapped
        return 1 if self.refuses_access else 0

    def cuMemUnmap(self, address, size):  # noqa: N802
        del self.mapped[address.value]
        return 0

    def cuMemRelease(self, handle):  # noqa: N802
        self.handles.remove(handle.value)
        self.left += 1
        return 0

    # --- of the account

    def outside_torch(self, nbytes):
        self.outside += nbytes

    def reclaim(self):
        self.left, self.torchs = self.left + self.torchs, 0


def region_of(library: Library, grains: int = 4) -> CudaRegion:
    def as_tensor(address, nbytes, device):
        assert address in library.mapped, "torch asks the driver, who knows only what is mapped"
        return torch.zeros(nbytes, dtype=torch.uint8)

    driver = Driver(0, library)
    return CudaRegion(grains * GRAIN - 512, GRAIN, CUDA, library, driver, as_tensor)


def test_what_is_backed_is_mapped_and_counted_until_it_is_given_back():
    """Grain by grain, the last one in full; torch is told how much it has to leave."""
    library = Library(10)
    region = region_of(library)
    assert library.reserved == 4 * GRAIN
    region.back(Place(0, 4 * GRAIN - 512))
    assert region.typed(torch.bfloat16).shape == (2 * GRAIN - 256,)
    assert library.outside == 4 * GRAIN
    region.give_back(Place(GRAIN, 2 * GRAIN))
    assert sorted(library.mapped) == [1 << 40, (1 << 40) + 3 * GRAIN]
    assert (library.left, library.outside, len(library.handles)) == (8, 2 * GRAIN, 2)


def test_torch_gives_what_it_keeps_before_anything_is_refused():
    """Its cache is nobody's."""
    library = Library(4, torchs=3)
    region_of(library).back(Place(0, 3 * GRAIN))
    assert library.torchs == 0


def test_a_device_without_memory_refuses_and_nothing_is_left():
    """Neither mapped nor counted."""
    library = Library(2)
    region = region_of(library)
    with pytest.raises(Failed, match=r"no 6,291,456 bytes of the device's memory") as error:
        region.back(Place(0, 3 * GRAIN))
    assert error.value.code == "resource_exhausted"
    assert (library.mapped, library.handles, library.left, library.outside) == ({}, set(), 2, 0)


def test_memory_that_cannot_be_used_is_not_kept():
    """Whatever the driver refuses on the way."""
    library = Library(2)
    library.refuses_access = True
    with pytest.raises(Failed):
        region_of(library).back(Place(0, GRAIN))
    assert (library.mapped, library.handles, library.left, library.outside) == ({}, set(), 2, 0)


def test_the_drivers_structures_have_their_sizes():
    """As its header tells them."""
    driver = Driver(3, Library(0))
    assert ctypes.sizeof(driver._properties) == 32
    assert ctypes.sizeof(driver._access) == 12
    assert driver._access.location.number == 3
