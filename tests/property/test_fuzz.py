"""Whatever bytes come over a border, they cost a refusal at most: mutations of valid ones, for
some seconds. `python -m tests.fuzz` searches the same targets for longer (docs/security.md)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.kit import mutated, timed, weighed
from tests.fuzz.targets import TARGETS
from tests.logged import logged

NAMES = sorted(TARGETS)
NUMBERS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6)


@pytest.fixture(autouse=True, scope="module")
def lines() -> Iterator[None]:
    """Log lines are made of what comes, and nobody reads them."""
    with logged():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_valid_bytes_pass_within_their_bounds(name: str) -> None:
    """The seeds of the mutations, among them what was once found."""
    for seed in TARGETS[name].seeds:
        timed(TARGETS[name].run, seed)
        weighed(TARGETS[name].run, seed)


@pytest.mark.parametrize("name", NAMES)
def test_mutated_bytes_cost_a_refusal_at_most(name: str) -> None:
    """Bits flipped, cut off, spliced, repeated, lengths and nestings at their extremes."""

    @settings(
        max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(NUMBERS)
    def survives(edits: list[int]) -> None:
        timed(TARGETS[name].run, mutated(TARGETS[name], edits))

    survives()
