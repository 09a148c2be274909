from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.worker.engine.extents import NoRoom, Plan, Space, grain_for
from services.worker.engine.places import NOWHERE, Move, Place, joined, merged
from shared.layout import ALIGNMENT, aligned

U = ALIGNMENT
MIB = 1 << 20


def do(space: Space, plan: Plan | NoRoom) -> tuple[Place, ...]:
    """Carries a plan out, as a tier does."""
    assert isinstance(plan, Plan), plan
    for place in (*(move.target for move in plan.moves), *plan.places):
        for stretch in list(space.unbacked(place)):
            space.back(stretch)
    for move in plan.moves:
        space.free(move.source)
        space.take(move.target)
    for place in plan.places:
        space.take(place)
    return plan.places


def fill(space: Space, *sizes: int) -> tuple[Place, ...]:
    return do(space, space.plan(sizes))


@pytest.mark.parametrize(
    ("budget", "grain"), [(0, 2), (100, 2), (16 * 1024, 8), (24 * 1024, 12), (100_000, 16)]
)
def test_a_grain_follows_from_the_budget_within_bounds(budget, grain):
    """Whole huge pages, and not too many of them."""
    assert grain_for(budget * MIB) == grain * MIB


def test_a_group_of_blocks_lies_together_in_its_order():
    """What is planned together can be copied at once."""
    space = Space(100 * U, 10 * U)
    assert merged(fill(space, 3 * U, 1, 0, 2 * U)) == [Place(0, 6 * U)]


def test_an_empty_block_is_nowhere():
    """No bytes take no room, and can be given back like any others."""
    space = Space(0, U)
    places = fill(space, 0, 0)
    assert places == (NOWHERE, NOWHERE)
    space.free(places[0])
    space.validate()


def test_planning_changes_nothing():
    """A plan that nobody carries out leaves the space as it was, a refusal and one with moves
    too."""
    space = Space(20 * U, 10 * U)
    first, _ = fill(space, 4 * U), fill(space, 3 * U)
    space.free(first[0])
    before = repr(space), list(space.empty)
    space.plan([12 * U, 3 * U])
    assert isinstance(space.plan([30 * U]), NoRoom)
    plan = space.plan([14 * U])
    assert isinstance(plan, Plan)
    assert plan.moves
    assert (repr(space), list(space.empty)) == before
    space.validate()


def test_the_smallest_hole_is_used_that_takes_the_whole_group():
    """Large ones are kept for what is large."""
    space = Space(100 * U, 10 * U)
    first, second, third, _ = (fill(space, size * U) for size in (4, 2, 3, 1))
    space.free(first[0])
    space.free(third[0])
    assert fill(space, U, 2 * U) == (Place(6 * U, U), Place(7 * U, 2 * U))
    assert second == (Place(4 * U, 2 * U),)


def test_a_large_group_is_cut_into_few_runs():
    """Neighbours stay neighbours in what there is."""
    space = Space(20 * U, 10 * U)
    places = fill(space, 6 * U, 2 * U, 8 * U)
    space.free(places[0])
    assert merged(fill(space, *[U] * 9)) == [Place(0, 6 * U), Place(16 * U, 3 * U)]


def test_blocks_are_scattered_before_any_is_moved():
    """When no runs can be had, every block finds the hole that suits it."""
    space = Space(30 * U, 30 * U)
    places = fill(space, *[U] * 30)
    for offset in (0, 4, 5, 10, 11, 12, 13):
        space.free(places[offset])
    plan = space.plan([U, 2 * U, 4 * U])
    assert plan == Plan((), (Place(0, U), Place(4 * U, 2 * U), Place(10 * U, 4 * U)))
    do(space, plan)
    assert space.plan([1]) == NoRoom(U, 0)


def test_as_few_bytes_as_possible_are_moved():
    """The holes that are joined are those with the least between them."""
    space = Space(30 * U, 10 * U)
    places = fill(space, 5 * U, 6 * U, 5 * U, 4 * U, 5 * U, 5 * U)
    for place in places[::2]:
        space.free(place)
    plan = space.plan([9 * U])
    assert plan == Plan((Move(places[3], Place(11 * U, 4 * U)),), (Place(15 * U, 9 * U),))


def test_only_grains_in_use_are_backed():
    """The last one is what is left of the budget."""
    space = Space(25 * U, 10 * U)
    first, second = fill(space, 9 * U), fill(space, 16 * U)
    assert space.reserved_bytes == 25 * U
    space.free(second[0])
    assert list(space.empty) == [1, 2]
    (stretch,) = space.stretches(space.empty)
    assert stretch == Place(10 * U, 15 * U)
    space.give_back(stretch)
    assert space.reserved_bytes == 10 * U
    assert list(space.unbacked(Place(5 * U, 6 * U))) == [Place(10 * U, 10 * U)]
    space.free(first[0])
    space.validate()


def test_a_lower_budget_is_for_what_comes_later():
    """What is in use stays; nothing is added, not even into a hole, until there is room again.
    Then what stands beyond the budget falls below it."""
    space = Space(20 * U, 5 * U)
    first, second = fill(space, 8 * U), fill(space, 8 * U)
    space.limit(12 * U)
    assert space.plan([U]) == NoRoom(U, 0)
    space.free(first[0])
    assert isinstance(space.plan([5 * U]), NoRoom)
    plan = space.plan([4 * U])
    assert plan == Plan((Move(second[0], Place(0, 8 * U)),), (Place(8 * U, 4 * U),))
    do(space, plan)
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
    """Only what a plan told to be free can be taken, and what is taken is not given back."""
    space = Space(10 * U, 10 * U)
    (place,) = fill(space, 2 * U)
    with pytest.raises(AssertionError, match="not free"):
        space.take(place)
    with pytest.raises(KeyError):
        space.give_back(Place(0, 10 * U))


def test_copies_are_joined_where_both_sides_go_on():
    """A gap on either side begins another copy; blocks of no bytes are none."""
    a, b, c = Place(0, U), Place(U, U), Place(2 * U, U)
    assert joined([(a, b), (NOWHERE, NOWHERE), (b, c)]) == [(Place(0, 2 * U), Place(U, 2 * U))]
    assert joined([(a, a), (b, c)]) == [(a, a), (b, c)]
    assert joined([(b, a), (a, b)]) == [(b, a), (a, b)]
    assert joined([]) == []


@given(st.lists(st.integers(0, 2000), max_size=40), st.integers(1, 64))
def test_what_fits_an_empty_space_to_the_last_byte_is_found_room(sizes, grain):
    """With nothing in the way no byte is lost."""
    plan = Space(sum(map(aligned, sizes)), grain * U).plan(sizes)
    assert isinstance(plan, Plan)
    assert not plan.moves


class Filling(RuleBasedStateMachine):
    """Groups come and go in any order, and the budget with them."""

    def __init__(self):
        super().__init__()
        self.space = Space(66 * U, 16 * U)
        self.groups: list[list[Place]] = []

    @rule(sizes=st.lists(st.integers(0, 20 * U), min_size=1, max_size=8))
    def enter(self, sizes):
        needs = [aligned(size) for size in sizes]
        plan = self.space.plan(sizes)
        left = self.space.budget_bytes - self.space.used_bytes
        assert isinstance(plan, Plan) == (sum(needs) <= left), "the bytes alone decide"
        if isinstance(plan, NoRoom):
            assert plan == NoRoom(sum(needs), max(left, 0))
            return
        places = do(self.space, plan)
        assert [place.nbytes for place in places] == needs
        assert max(place.end for place in places) <= self.space.budget_bytes
        self._follow(plan.moves)
        self.groups.append(list(places))

    def _follow(self, moves):
        starts = [move.source.offset for move in moves]
        assert starts == sorted(starts)
        for one, other in itertools.pairwise(moves):
            assert one.target.end <= other.source.offset, "it is written over before it is moved"
        for move in moves:
            assert move.target.offset < move.source.offset
            by = move.source.offset - move.target.offset
            for group in self.groups:
                for index, place in enumerate(group):
                    if place.nbytes and move.source.offset <= place.offset < move.source.end:
                        group[index] = Place(place.offset - by, place.nbytes)

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def leave(self, data):
        index = data.draw(st.integers(0, len(self.groups) - 1))
        for place in self.groups.pop(index):
            self.space.free(place)

    @rule(budget=st.integers(0, 70))
    def limit(self, budget):
        self.space.limit(budget * U)

    @rule()
    def tidy(self):
        for stretch in list(self.space.stretches(sorted(self.space.empty))):
            self.space.give_back(stretch)

    @invariant()
    def no_two_overlap(self):
        self.space.validate()
        places = sorted(place for group in self.groups for place in group if place.nbytes)
        assert sum(place.nbytes for place in places) == self.space.used_bytes
        for one, other in itertools.pairwise(places):
            assert one.end <= other.offset
        assert not places or places[-1].end <= 66 * U

    def teardown(self):
        for group in self.groups:
            for place in group:
                self.space.free(place)
        self.tidy()
        self.space.validate()
        assert self.space.used_bytes == self.space.reserved_bytes == 0


Filling.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestFilling = Filling.TestCase


# --- real sizes, nearly full --------------------------------------------------------------


def bert(vocabulary: int, width: int, layers: int) -> list[int]:
    """Bytes of each tensor of such a BERT, two a weight."""
    each = [width * width * 2, width * 2] * 4 + [width * 2] * 4
    each += [4 * width * width * 2, 8 * width, 4 * width * width * 2, width * 2]
    head = [vocabulary * width * 2, 512 * width * 2, 2 * width * 2, width * 2, width * 2]
    return [*head, *each * layers, width * width * 2, width * 2, 2 * width * 2, 4]


MINILM, BASE = bert(30522, 384, 6), bert(30522, 768, 12)


@pytest.mark.parametrize(
    ("kinds", "slots"), [([MINILM], 8), ([BASE], 4), ([MINILM, BASE], 5), ([MINILM, BASE[1:]], 6)]
)
def test_a_nearly_full_tier_swaps_real_models_without_refusal_or_waste(kinds, slots):
    """Random swaps of models with one block as large as half of the model: what fits by its bytes
    is never refused, little is moved for it, and little is backed beside what is used."""
    rng = random.Random(7)
    budget = slots * max(sum(map(aligned, kind)) for kind in kinds) + 9 * U
    space = Space(budget)
    models: list[list[Place]] = []
    entered = moved = worst = 0
    for _ in range(300):
        kind = rng.choice(kinds)
        need = sum(map(aligned, kind))
        while space.used_bytes + need > budget:
            for place in merged(models.pop(rng.randrange(len(models)))):
                space.free(place)
        plan = space.plan(kind)
        assert isinstance(plan, Plan)
        entered += need
        moved += sum(move.source.nbytes for move in plan.moves)
        for move in plan.moves:
            by = move.source.offset - move.target.offset
            for group in models:
                for index, place in enumerate(group):
                    if move.source.offset <= place.offset < move.source.end:
                        group[index] = Place(place.offset - by, place.nbytes)
        models.append(list(do(space, plan)))
        space.validate()
        assert space.reserved_bytes <= budget
        for stretch in list(space.stretches(sorted(space.empty))):
            space.give_back(stretch)
        waste = space.reserved_bytes - space.used_bytes
        pieces = len(merged(sorted(place for group in models for place in group)))
        assert waste <= (pieces + 1) * 2 * space.grain
        worst = max(worst, waste)
    assert moved <= 0.1 * entered
    assert worst <= 0.03 * budget
