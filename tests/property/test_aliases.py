"""Splits: every request gets a version that has a weight, in proportion."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shared.aliases import MAX_WEIGHT, Alias, Pending, choose, heaviest, missing, needed, point_of

VERSIONS = st.integers(1, 2**31 - 1)
SPLITS = st.dictionaries(VERSIONS, st.integers(1, MAX_WEIGHT), min_size=1, max_size=16)
POINTS = st.floats(0, 1, exclude_max=True)


@given(SPLITS, POINTS)
def test_a_point_has_a_version_of_the_split(split, point):
    """Whatever the weights are, and at both ends."""
    assert choose(split, point) in split
    assert choose(split, 0.0) == min(split)
    assert choose(split, 1 - 2**-53) == max(split)


@given(SPLITS)
def test_points_in_equal_steps_meet_each_version_by_its_weight(split):
    """To within one step at each end of its part."""
    steps = 1000
    met = Counter(choose(split, step / steps) for step in range(steps))
    total = sum(split.values())
    for version, weight in split.items():
        assert abs(met[version] - steps * weight / total) <= 1 + 1e-6


@given(st.integers(0, 2**32), st.integers(1, 99))
def test_chance_keeps_to_the_weights(seed, percent):
    """Of 2,000 requests, within five standard deviations."""
    draw = random.Random(seed).random
    met = Counter(choose({3: 100 - percent, 4: percent}, draw()) for _ in range(2000))
    share = percent / 100
    assert abs(met[4] - 2000 * share) <= 5 * (2000 * share * (1 - share)) ** 0.5


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_key_has_one_point(model, key):
    """Within the whole, and always the same."""
    assert 0 <= point_of(model, key) < 1
    assert point_of(model, key) == point_of(model, key)


@given(POINTS, st.lists(st.integers(0, 100), min_size=2, max_size=6).map(sorted))
def test_who_has_the_canary_keeps_it_while_it_grows(point, shares):
    """The new version is the higher one: as its share grows, clients change to it once."""
    met = [choose({v: w for v, w in ((1, 100 - s), (2, s)) if w}, point) for s in shares]
    assert met == sorted(met)


@given(SPLITS, SPLITS, st.dictionaries(VERSIONS, st.integers(0, 50)), st.integers(0, 50))
def test_a_flip_needs_what_can_be_had(present, to, bound, workers):
    """Never more copies than workers, never fewer in all than now unless workers are too few, and
    nothing is missing once each version has what it needs."""
    alias = Alias(present, Pending(to, 0.0))
    most = dict.fromkeys(alias.versions(), workers)
    needs = needed(alias, bound, most)
    assert needs.keys() == to.keys()
    now = sum(bound.get(version, 0) for version in present)
    assert all(0 <= copies <= workers for copies in needs.values())
    assert sum(needs.values()) >= min(now, workers)
    assert missing(needs, bound | needs) == []
    assert heaviest(to) in to
