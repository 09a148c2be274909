from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.worker.engine.extents import NOWHERE, NoRoom, Place, Plan, Space, joined, merged
from shared.layout import ALIGNMENT, aligned

U = ALIGNMENT
MIB = 1 << 20


def do(space: Space, plan: Plan | NoRoom) -> tuple[Place, ...]:
    """Carries a plan out, as a tier does."""
    assert isinstance(plan, Plan), plan
    for slab in plan.drop:
        space.drop(slab)
    for slab, nbytes in plan.make:
        space.add(slab, nbytes)
    for place in plan.places:
        space.take(place)
    return plan.places


def fill(space: Space, *sizes: int) -> tuple[Place, ...]:
    return do(space, space.plan(sizes))


@pytest.mark.parametrize(
    ("budget", "slab"),
    [(0, 32), (100, 32), (1600, 100), (16 * 256, 256), (100_000, 256)],
)
def test_a_slab_is_a_sixteenth_of_the_budget_within_bounds(budget, slab):
    """Small budgets do not break into crumbs, and large ones give back in pieces that matter."""
    assert Space(budget * MIB).slab_bytes == slab * MIB


def test_a_group_of_blocks_lies_together_in_its_order():
    """What is planned together can be copied at once."""
    space = Space(100 * U, 10 * U)
    assert merged(fill(space, 3 * U, 1, 0, 2 * U)) == [Place(1, 0, 6 * U)]


def test_an_empty_block_is_nowhere():
    """No bytes take no room, and can be given back like any others."""
    space = Space(0, U)
    places = fill(space, 0, 0)
    assert places == (NOWHERE, NOWHERE)
    space.free(places[0])
    space.validate()


def test_planning_changes_nothing():
    """A plan that nobody carries out leaves the space as it was, a refusal too."""
    space = Space(20 * U, 10 * U)
    fill(space, 4 * U)
    before = repr(space), list(space.holes())
    space.plan([12 * U, 3 * U])
    assert isinstance(space.plan([30 * U]), NoRoom)
    assert (repr(space), list(space.holes())) == before


def test_a_freed_hole_is_used_before_a_new_slab():
    """The smallest hole that takes the whole group is chosen."""
    space = Space(100 * U, 10 * U)
    first, second, third, _ = (fill(space, size * U) for size in (4, 2, 3, 1))
    space.free(first[0])
    space.free(third[0])
    assert fill(space, U, 2 * U) == (Place(1, 6 * U, U), Place(1, 7 * U, 2 * U))
    assert second == (Place(1, 4 * U, 2 * U),)


def test_a_large_group_is_cut_into_few_runs():
    """Slabs are filled to their end, and neighbours stay neighbours in what remains."""
    space = Space(100 * U, 10 * U)
    fill(space, 6 * U)
    assert merged(fill(space, *[U] * 12)) == [Place(1, 6 * U, 4 * U), Place(2, 0, 8 * U)]


def test_a_crumb_of_a_hole_is_left_alone_while_there_is_budget():
    """A run that would carry next to nothing is not worth a copy of its own."""
    space = Space(1000 * U, 100 * U)
    fill(space, 99 * U)
    assert merged(fill(space, *[U] * 80)) == [Place(2, 0, 80 * U)]


def test_blocks_are_scattered_before_they_are_refused():
    """When no runs can be had, every block finds the hole that suits it."""
    space = Space(30 * U, 30 * U)
    places = fill(space, *[U] * 30)
    for offset in (0, 4, 5, 10, 11, 12, 13):
        space.free(places[offset])
    found = fill(space, U, 2 * U, 4 * U)
    assert found == (Place(1, 0, U), Place(1, 4 * U, 2 * U), Place(1, 10 * U, 4 * U))
    assert isinstance(space.plan([1]), NoRoom)


def test_a_block_larger_than_a_slab_gets_its_own():
    """Its slab is little larger than it."""
    space = Space(1000 * U, 32 * U)
    fill(space, 101 * U)
    assert space.slab_sizes == {1: 102 * U}


def test_the_last_bit_of_the_budget_is_a_smaller_slab():
    """The slabs add up to the budget, not to a multiple of their size."""
    space = Space(25 * U, 10 * U)
    fill(space, *[U] * 25)
    assert list(space.slab_sizes.values()) == [10 * U, 10 * U, 5 * U]
    refusal = space.plan([1])
    assert isinstance(refusal, NoRoom)
    assert str(refusal) == (
        "needs 512 bytes: 0 are free, at most 0 of them in one piece, and 0 more may be reserved"
    )


def test_empty_slabs_make_way_for_a_block_that_none_of_them_holds():
    """Room that is reserved in the wrong pieces is not lost."""
    space = Space(30 * U, 10 * U)
    places = fill(space, *[5 * U] * 6)
    for place in places[2:]:
        space.free(place)
    plan = space.plan([15 * U])
    assert isinstance(plan, Plan)
    assert plan.drop == (2, 3)
    do(space, plan)
    space.validate()


def test_a_lower_budget_is_for_what_comes_later():
    """What is in use stays; nothing is added, not even into a hole, until there is room again."""
    space = Space(20 * U, 10 * U)
    first, second = fill(space, 8 * U), fill(space, 8 * U)
    space.limit(12 * U)
    refusal = space.plan([U])
    assert refusal == NoRoom(U, 0, 0, 0)
    space.free(first[0])
    assert isinstance(space.plan([5 * U]), NoRoom)
    fill(space, 4 * U)
    space.free(second[0])
    space.limit(20 * U)
    fill(space, *[U] * 16)
    space.validate()


def test_giving_back_twice_is_noticed():
    """A place that is free already cannot be freed: two blocks would be given the same bytes."""
    space = Space(10 * U, 10 * U)
    one, two, _ = fill(space, U, U, U)
    space.free(one)
    with pytest.raises(AssertionError, match="free already"):
        space.free(one)
    space.free(two)
    with pytest.raises(AssertionError, match="free already"):
        space.free(two)


def test_taking_what_is_taken_is_noticed():
    """Only what a plan told to be free can be taken."""
    space = Space(10 * U, 10 * U)
    (place,) = fill(space, 2 * U)
    with pytest.raises(AssertionError, match="not free"):
        space.take(place)
    with pytest.raises(AssertionError, match="in use"):
        space.drop(1)


def test_copies_are_joined_where_both_sides_go_on():
    """A gap on either side begins another copy; blocks of no bytes are none."""
    a, b, c = Place(1, 0, U), Place(1, U, U), Place(1, 2 * U, U)
    assert joined([(a, b), (NOWHERE, NOWHERE), (b, c)]) == [
        (Place(1, 0, 2 * U), Place(1, U, 2 * U))
    ]
    assert joined([(a, a), (b, c)]) == [(a, a), (b, c)]
    assert joined([(a, a), (b, Place(2, U, U))]) == [(a, a), (b, Place(2, U, U))]
    assert joined([]) == []


@given(st.lists(st.integers(0, 2000), max_size=40), st.integers(1, 64))
def test_what_fits_an_empty_space_is_found_room(sizes, slab):
    """With nothing in the way only the sum counts, as long as no block is near a slab's size."""
    largest = max(map(aligned, sizes), default=0)
    slab_bytes = slab * U + 2 * largest
    # A slab may end with a hole in which the next block did not fit.
    budget = 2 * sum(map(aligned, sizes)) + slab_bytes
    assert isinstance(Space(budget, slab_bytes).plan(sizes), Plan)


class Filling(RuleBasedStateMachine):
    """Groups come and go in any order."""

    def __init__(self):
        super().__init__()
        self.space = Space(64 * U, 16 * U)
        self.groups: list[tuple[Place, ...]] = []

    @rule(sizes=st.lists(st.integers(0, 20 * U), min_size=1, max_size=8))
    def enter(self, sizes):
        plan = self.space.plan(sizes)
        if isinstance(plan, Plan):
            places = do(self.space, plan)
            assert [place.nbytes for place in places] == [aligned(size) for size in sizes]
            self.groups.append(places)
            return
        assert plan.need == sum(map(aligned, sizes))
        assert plan.free + plan.unreserved == self.space.budget_bytes - self.space.used_bytes
        # A refusal is right: either the sum is too great, or it is for the pieces.
        largest = max(map(aligned, sizes))
        pieces = self.space.budget_bytes // (16 * U) + len(list(self.space.holes()))
        if largest <= plan.largest:
            assert plan.free + plan.unreserved - plan.need < largest * pieces

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def leave(self, data):
        index = data.draw(st.integers(0, len(self.groups) - 1))
        for place in self.groups.pop(index):
            self.space.free(place)

    @rule()
    def tidy(self):
        for slab in self.space.empty_slabs():
            self.space.drop(slab)

    @invariant()
    def no_two_overlap(self):
        self.space.validate()
        places = sorted(place for group in self.groups for place in group if place.nbytes)
        assert sum(place.nbytes for place in places) == self.space.used_bytes
        for one, other in itertools.pairwise(places):
            assert one.slab < other.slab or one.offset + one.nbytes <= other.offset
        for slab, offset, nbytes in places:
            assert offset + nbytes <= self.space.slab_sizes[slab]

    def teardown(self):
        for group in self.groups:
            for place in group:
                self.space.free(place)
        self.space.validate()
        assert self.space.used_bytes == 0
        assert self.space.empty_slabs() == self.space.slab_sizes


Filling.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFilling = Filling.TestCase
