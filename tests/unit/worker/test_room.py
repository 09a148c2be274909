"""A sum that is kept says what `shared.fit` says of the whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.room import Room
from shared.fit import fit, used_bytes
from shared.layout import Share
from shared.models import Footprint
from shared.names import ModelId

footprints = st.builds(
    lambda own, workspace, keys: Footprint(
        own + sum(size for _, size in keys),
        workspace,
        shares=tuple(Share(key, size) for key, size in sorted(keys)),
    ),
    own=st.integers(0, 40),
    workspace=st.integers(0, 20),
    keys=st.sets(st.sampled_from([("a", 10), ("b", 30), ("c", 7)])),
)
models = st.sampled_from([ModelId(f"m{n}/1") for n in range(6)])


def room(budget: int, held: dict[ModelId, Footprint]) -> Room:
    made = Room()
    made.budget_bytes = budget
    for model, footprint in held.items():
        made.put(model, footprint)
    return made


@given(st.lists(st.tuples(models, st.none() | footprints), max_size=30))
def test_the_sum_follows_whatever_comes_grows_and_goes(steps):
    """Also what is put in again, with another size."""
    made, held = Room(), {}
    for model, footprint in steps:
        before = made.version, dict(held)
        if footprint is None:
            made.remove(model)
            held.pop(model, None)
        else:
            made.put(model, footprint)
            held[model] = footprint
        made.validate()
        assert made.used_bytes() == used_bytes(held.values())
        assert (made.version == before[0]) == (held == before[1])
    unshared = sum(each.weights_bytes for each in held.values())
    workspace = max((each.workspace_bytes for each in held.values()), default=0)
    assert made.shared_bytes() == unshared + workspace - made.used_bytes()


@given(st.dictionaries(models, footprints), footprints, st.sets(models), st.integers(0, 200))
def test_it_answers_as_fit_does(held, newcomer, gone, budget):
    """Whoever is thought away."""
    made = room(budget, held)
    gone = {model for model in gone if model in held}
    rest = [footprint for model, footprint in held.items() if model not in gone]
    assert made.fits(newcomer, gone) == (fit(newcomer, rest, budget) is None)
    assert made.fits(None, gone) == (used_bytes(rest) <= budget)


@given(
    st.dictionaries(models, footprints), st.none() | footprints, st.permutations(range(6)),
    st.integers(0, 200),
)  # fmt: skip
def test_victims_make_the_room_and_none_goes_for_nothing(held, newcomer, order, budget):
    """None where even all of them would not do."""
    made = room(budget, held)
    candidates = [name for n in order if (name := ModelId(f"m{n}/1")) in held]
    victims = made.victims(newcomer, candidates)
    if victims is None:
        assert not made.fits(newcomer, candidates)
        return
    assert made.fits(newcomer, victims)
    for spared in victims:
        assert not made.fits(newcomer, [victim for victim in victims if victim != spared])
