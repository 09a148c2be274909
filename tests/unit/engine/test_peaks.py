from __future__ import annotations

import pytest

pytest.importorskip("torch")

from services.worker.engine.peaks import Peaks
from services.worker.engine.unrest import Unrest

pytestmark = pytest.mark.torch


class Allocator:
    """As a device counts: the peak of what is taken, from what was taken at the beginning."""

    def __init__(self):
        self.taken = self._before = self._peak = 0

    def take(self, nbytes):
        self.taken += nbytes
        self._peak = max(self._peak, self.taken)

    def begin_measuring(self):
        self._before = self._peak = self.taken

    def peak_bytes(self):
        return self._peak - self._before


@pytest.fixture
def device():
    return Allocator()


def measured(peaks, device, *, land_first: bool) -> int | None:
    """Batch 2, whose peak is 100, beside batch 1, which keeps 30 and lands meanwhile or not."""
    peaks.board(1, 30)
    device.take(30)
    peaks.board(2, 10)
    before = peaks.begin(2)
    assert before is not None
    if land_first:
        peaks.land(1, lambda: device.take(-30))
    device.take(100)
    device.take(-90)
    return peaks.end(before)


@pytest.mark.parametrize("land_first", [False, True])
def test_a_batch_s_own_peak_is_told_with_room_for_the_one_beside_it(device, land_first):
    """The same whether the other one's bytes were still there at the peak or not."""
    peaks = Peaks(device, Unrest(), beside=True)
    assert measured(peaks, device, land_first=land_first) == 100 + 30


def test_where_batches_come_one_by_one_the_peak_is_all(device):
    """There is nothing beside it."""
    peaks = Peaks(device, Unrest(), beside=False)
    peaks.board(1, 10)
    before = peaks.begin(1)
    device.take(100)
    assert peaks.end(before) == 100


def test_nothing_is_told_when_models_came_or_went(device):
    """Neither begun beside a load, nor with one that began and ended within."""
    unrest = Unrest()
    peaks = Peaks(device, unrest, beside=False)
    with unrest:
        assert peaks.begin(1) is None
    before = peaks.begin(1)
    with unrest:
        pass
    assert peaks.end(before) is None
