from __future__ import annotations

import pytest

pytest.importorskip("torch")

from services.worker.engine.extents import Space
from services.worker.engine.tiers import Tier
from shared.names import ModelId

pytestmark = pytest.mark.torch

KIB = 1024
ONE, TWO = ModelId("m/1"), ModelId("m/2")


class Slab:
    def __init__(self, nbytes: int):
        self.nbytes = nbytes

    def release(self):
        pass


class Rig:
    """A tier of four slabs, and how often its memory was given back."""

    def __init__(self):
        self.given_back = 0
        self.tier = Tier("device", Space(64 * KIB, 16 * KIB), Slab, 5.0, self._give_back)

    def _give_back(self):
        self.given_back += 1

    def enter(self, model, kib):
        self.tier.enter(model, {(model, 0): kib * KIB})


@pytest.fixture
def rig():
    return Rig()


def test_memory_is_given_back_once_for_all_slabs_that_stayed_empty(rig):
    """It stops the device, so it is not done for each of them."""
    rig.enter(ONE, 16)
    rig.enter(TWO, 16)
    rig.tier.leave(ONE)
    rig.tier.leave(TWO)
    assert rig.tier.tidy(10.0) == 15.0
    assert rig.given_back == 0
    assert rig.tier.tidy(15.0) is None
    assert rig.given_back == 1
    assert rig.tier.tidy(20.0) is None
    assert rig.given_back == 1


def test_slabs_that_go_for_others_are_given_back_later(rig):
    """Who needs the room finds it where it was released; only the rest is the system's, when
    nobody has taken it in time."""
    rig.enter(ONE, 16)
    rig.tier.leave(ONE)
    rig.tier.limit(0)
    assert rig.tier.spare_bytes == 0
    assert rig.given_back == 0
    assert rig.tier.tidy(10.0) == 15.0
    assert rig.tier.tidy(14.0) == 15.0
    assert rig.given_back == 0
    assert rig.tier.tidy(15.0) is None
    assert rig.given_back == 1
