"""Measurements: what is estimated from them, and when they are written down."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.profile import BatchTimes, Measured, warm_ups
from services.worker.wire import ModelLoaded, WarmUp
from shared.layout import Block, Layout, Share
from shared.models import Case, ModelSpec, Padding, Profile, TensorSpec
from shared.names import model_id

MODEL = model_id("m", 1)
SHARE = Share("0" * 16, 512)
LAYOUT = Layout(
    architecture="a" * 64,
    blocks=(Block(b"x" * 32, 0, 512), Block(b"y" * 32, 512, 1000)),
    shares=(SHARE,),
)
SPEC = ModelSpec(
    inputs=(TensorSpec("x", "INT64", (-1,)),),
    max_batch_size=8,
    padding=Padding(inputs={"x": 0}, sizes=(16, 64)),
)


def loaded(weights: int = 400, *cases: Case, seconds: float = 0.2, **more) -> ModelLoaded:
    return ModelLoaded(MODEL, (), weights, seconds, cases, **({"architecture": "new"} | more))


def test_nothing_is_known_at_first():
    """Zero is said, not guessed."""
    times = BatchTimes()
    assert times.estimate(4, 0) == 0.0
    assert times.seconds_per_item == 0.0


def test_between_and_beyond_what_was_measured():
    """Interpolated between, by the cost of a row beyond, never below the smallest."""
    times = BatchTimes((Case(2, 0, 0.02), Case(8, 0, 0.05)))
    assert times.estimate(5, 0) == pytest.approx(0.035)
    assert times.estimate(16, 0) == pytest.approx(0.1)
    assert times.estimate(1, 0) == 0.02
    assert times.seconds_per_item == pytest.approx(0.01)


def test_a_size_never_measured_is_like_the_next_greater_one():
    """Element for element; beyond the greatest, like that."""
    times = BatchTimes((Case(1, 32, 0.02), Case(1, 128, 0.1)))
    assert times.estimate(1, 32) == 0.02
    assert times.estimate(1, 64) == pytest.approx(0.05)
    assert times.estimate(1, 256) == pytest.approx(0.2)
    assert times.estimate(2, 16) == pytest.approx(0.02)


def test_a_case_without_seconds_teaches_nothing_of_time():
    """Memory may be known where time is not."""
    assert BatchTimes((Case(1, 0, 0.0, 500),)).estimate(1, 0) == 0.0


measurements = st.lists(
    st.tuples(st.integers(1, 65536), st.integers(0, 4096), st.floats(1e-6, 10)),
    min_size=1,
    max_size=300,
)


@given(measurements, st.booleans())
def test_estimates_stay_within_what_was_seen(measured, sized):
    """However many cases were seen, few are kept, and an estimate lies among them."""
    times = BatchTimes()
    for rows, size, seconds in measured:
        times.measured(rows, size if sized else 0, seconds)
    low, high = min(s for *_, s in measured), max(s for *_, s in measured)
    kept = list(times.measurements())
    assert len({size for _, size, _ in kept}) <= 64
    assert max(sum(each == size for _, each, _ in kept) for _, size, _ in kept) <= 65
    for rows, size, _ in kept:
        assert low * 0.999 <= times.estimate(rows, size) <= high * 1.001
    for rows in (1, measured[0][0], max(rows for rows, *_ in measured)):
        assert 0 < times.estimate(rows, measured[0][1]) <= high * 70_000 * 4097


def test_an_estimate_gives_way_to_the_measurement():
    """Before the first load the file's size counts, or what another worker measured."""
    assert Measured(500, None).footprint.measured is False
    stored = Profile(device_kind="cpu", weights_bytes=400, cases=(Case(8, 0, 0.1, 50),))
    measured = Measured(500, stored)
    assert (measured.footprint.weights_bytes, measured.footprint.workspace_bytes) == (400, 50)
    measured.load(loaded(450, Case(1, 0, 0.01, 10)))
    assert (measured.footprint.weights_bytes, measured.footprint.workspace_bytes) == (450, 50)


def test_a_layout_says_the_weights_before_the_first_load():
    """And what of them is had in common, unless that is switched off or cannot be told apart."""
    measured = Measured(5000, None, LAYOUT)
    assert measured.footprint.weights_bytes == LAYOUT.weights_bytes == 1536
    assert measured.footprint.shares == (SHARE,)
    assert Measured(5000, None, LAYOUT, share=False).footprint.shares == ()
    obstacle = msgspec.structs.replace(LAYOUT, obstacle="quantized")
    assert Measured(5000, None, obstacle).footprint.weights_bytes == 5000
    assert Measured(5000, None, obstacle).footprint.shares == ()


def test_what_was_loaded_as_a_whole_shares_nothing():
    """Whatever the layout promised."""
    measured = Measured(5000, None, LAYOUT)
    measured.load(loaded(1512, architecture="new"))
    assert measured.footprint.shares == (SHARE,)
    assert measured.footprint.weights_bytes == 1536  # shares are counted in whole blocks
    measured.load(loaded(1512, architecture="none"))
    assert (measured.footprint.shares, measured.footprint.weights_bytes) == ((), 1512)


def test_loads_and_swaps_are_timed_apart():
    """By where the weights came from; what only reached the host's memory is no measurement."""
    measured = Measured(500, None)
    measured.load(loaded(400, seconds=3.0, tier="host"))
    assert (measured.loaded, measured.load_seconds) == (False, 0.0)
    assert measured.footprint.weights_bytes == 400
    measured.load(loaded(400, seconds=2.0, source="disk"))
    measured.load(loaded(400, seconds=0.1, source="host", architecture="known"))
    assert (measured.load_seconds, measured.swap_seconds) == (2.0, 0.1)


def test_another_model_s_measurements_do_not_overrule_its_own():
    """They fill the gaps when the architecture was warm."""
    measured = Measured(500, None)
    measured.load(loaded(400, Case(1, 0, 0.010)))
    measured.load(loaded(400, Case(1, 0, 0.5), Case(8, 0, 0.040), architecture="known"))
    assert measured.times.estimate(1, 0) == 0.010
    assert measured.times.estimate(8, 0) == 0.040


def test_a_profile_is_kept_first_and_when_it_drifts():
    """Within a tenth nothing is written; a size that nothing was known of is news."""
    measured = Measured(500, None)
    assert measured.to_keep("cpu") is None
    measured.load(loaded(400, Case(1, 0, 0.01, 10)))
    assert measured.to_keep("cpu") is not None
    assert measured.to_keep("cpu") is None
    for _ in range(50):
        measured.times.measured(1, 0, 0.0105)
    assert measured.to_keep("cpu") is None
    for _ in range(50):
        measured.times.measured(1, 0, 0.02)
    assert measured.to_keep("cpu") is not None
    measured.times.measured(1, 64, 0.5)
    assert measured.to_keep("cpu") is not None
    measured.note_workspace(1, 64, 100)
    profile = measured.to_keep("cpu")
    assert profile is not None
    assert [(case.rows, case.size) for case in profile.cases] == [(1, 0), (1, 64)]
    assert profile.workspace_bytes == 100


def test_a_profile_read_back_says_the_same():
    """Whoever loads the model next estimates as we do."""
    measured = Measured(500, None)
    measured.load(loaded(400, Case(1, 16, 0.01, 10), Case(8, 64, 0.2, 90)))
    profile = measured.to_keep("cpu")
    read = Measured(500, msgspec.json.decode(msgspec.json.encode(profile), type=Profile))
    assert read.cases() == measured.cases()
    assert read.times.estimate(4, 64) == measured.times.estimate(4, 64)
    assert read.footprint.workspace_bytes == 90


def test_the_ends_of_every_declared_size_are_warmed_up():
    """The small batches first; of what was measured before, only those."""
    fresh = Measured(500, None)
    assert warm_ups(SPEC, fresh) == (WarmUp(1, 16), WarmUp(1, 64), WarmUp(8, 16), WarmUp(8, 64))
    assert warm_ups(ModelSpec(max_batch_size=4), fresh) == (WarmUp(1), WarmUp(4))
    assert warm_ups(ModelSpec(), fresh) == (WarmUp(1),)
    assert warm_ups(ModelSpec(stateful=True), fresh) == ()
    stored = Profile(device_kind="cpu", weights_bytes=400, cases=(Case(8, 16, 0.1),))
    assert warm_ups(SPEC, Measured(500, stored)) == (WarmUp(1, 16), WarmUp(1, 64))


def test_a_profile_without_cases_knows_the_weights_alone():
    """As those do that were written when memory stood by rows: the rest is measured again."""
    old = b'{"device_kind":"cpu","weights_bytes":5,"workspace_bytes":{"1":7},"batch_seconds":{}}'
    measured = Measured(500, msgspec.json.decode(old, type=Profile))
    assert (measured.footprint.weights_bytes, measured.footprint.measured) == (5, False)
    assert warm_ups(ModelSpec(max_batch_size=4), measured) == (WarmUp(1), WarmUp(4))
