from __future__ import annotations

import pytest

pytest.importorskip("torch")

from services.worker.engine.extents import Space
from services.worker.engine.failures import Failed
from services.worker.engine.places import Place
from services.worker.engine.tiers import Tier
from shared.names import ModelId

pytestmark = pytest.mark.torch

KIB = 1024
ONE, TWO, THREE = ModelId("m/1"), ModelId("m/2"), ModelId("m/3")


class Region:
    """Of a system that has so many bytes."""

    def __init__(self, nbytes: int):
        self.left = nbytes

    def back(self, place: Place) -> None:
        if place.nbytes > self.left:
            raise Failed("resource_exhausted", "the system has no more")
        self.left -= place.nbytes

    def give_back(self, place: Place) -> None:
        self.left += place.nbytes


class Rig:
    """A tier of four grains."""

    def __init__(self, has=64 * KIB):
        self.moves = []
        self.region = Region(has)
        self.tier = Tier("device", Space(64 * KIB, 16 * KIB), self.region, 5.0, self._rearrange)

    def _rearrange(self, moves, moved):
        self.moves += moves
        moved()

    def enter(self, model, *kib):
        sizes = {(model, index): each * KIB for index, each in enumerate(kib)}
        return list(self.tier.enter(model, sizes).values())


def test_what_was_empty_for_long_is_given_back():
    """Not before, since a swap needs it again at once."""
    rig = Rig()
    rig.enter(ONE, 16)
    rig.enter(TWO, 16)
    rig.tier.leave(ONE)
    rig.tier.leave(TWO)
    assert rig.tier.tidy(10.0) == 15.0
    assert (rig.region.left, rig.tier.spare_bytes) == (32 * KIB, 32 * KIB)
    assert rig.tier.tidy(15.0) is None
    assert (rig.region.left, rig.tier.spare_bytes) == (64 * KIB, 0)


def test_a_lowered_budget_gives_back_at_once_what_it_has_to():
    """The others may take it then."""
    rig = Rig()
    rig.enter(ONE, 8)
    rig.enter(TWO, 40)
    rig.tier.leave(TWO)
    rig.tier.limit(48 * KIB)
    assert rig.region.left == 16 * KIB
    rig.tier.limit(20 * KIB)
    assert rig.region.left == 48 * KIB
    rig.tier.validate()


def test_others_are_moved_for_what_has_room_in_pieces_alone():
    """Each block is where its bytes have been moved to, in the order of the moves."""
    rig = Rig()
    rig.enter(ONE, 10)
    rig.enter(TWO, 20, 4)
    rig.enter(THREE, 10)
    rig.tier.filled([(TWO, 0), (TWO, 1), (THREE, 0)])
    rig.tier.leave(ONE)
    assert rig.enter(ONE, 30) == [Place(34 * KIB, 30 * KIB)]
    assert rig.moves == [(Place(10 * KIB, 34 * KIB), Place(0, 34 * KIB))]
    assert rig.tier.place_of((TWO, 1)) == Place(20 * KIB, 4 * KIB)
    assert rig.tier.place_of((THREE, 0)) == Place(24 * KIB, 10 * KIB)
    rig.tier.validate()


def test_a_system_without_memory_refuses_before_anything_has_changed():
    """No byte was moved, and everybody has what they had."""
    rig = Rig(has=48 * KIB)
    rig.enter(ONE, 10)
    rig.enter(TWO, 34)
    rig.tier.leave(ONE)
    with pytest.raises(Failed, match="the system has no more"):
        rig.enter(ONE, 30)
    assert not rig.moves
    assert ONE not in rig.tier
    rig.tier.validate()
