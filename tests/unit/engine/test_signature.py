from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.failures import Failed
from services.worker.engine.signature import Argument, bind, merge
from shared.models import TensorSpec

X = Argument("x", "tensor")
MASK = Argument("mask", "tensor", optional=True)
RATE = Argument("rate", "int", optional=True, default=3)
ODD = Argument("odd", "other", optional=True)


def spec(name: str) -> TensorSpec:
    return TensorSpec(name, "FP32", (-1,))


@given(st.permutations(["x", "mask", "rate"]))
def test_names_decide_whatever_their_order(names):
    """An input is the argument of its name, wherever it stands in the request."""
    bound = bind(names, (X, MASK, RATE))
    assert bound == (names.index("x"), names.index("mask"), names.index("rate"))


@pytest.mark.parametrize(
    ("names", "listed", "bound"),
    [
        (["x"], None, (0, None, None)),
        (["INPUT__1", "INPUT__0"], None, (1, 0, None)),
        (["other__2", "INPUT__0"], None, (1, None, 0)),
        (["b", "a"], ["a", "b"], (1, 0, None)),
        (["x", "mask"], ["mask", "x"], (0, 1, None)),
    ],
)
def test_inputs_without_the_arguments_names(names, listed, bound):
    """Indexes count arguments; else the manifest's order decides; real names go first."""
    specs = None if listed is None else [spec(each) for each in listed]
    assert bind(names, (X, MASK, RATE), specs) == bound


def test_an_argument_that_no_request_can_carry_is_not_counted():
    """Positions are those of the arguments that a request can give."""
    assert bind(["INPUT__1", "INPUT__0"], (X, ODD, RATE)) == (1, None, 0)
    with pytest.raises(Failed, match="no input 'odd'; the model takes x"):
        bind(["x", "odd"], (X, ODD, RATE))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x", "y"], r"no input 'y'; the model takes x \(tensor\), rate \(int, optional\)"),
        (["rate"], r"input 'x' is missing; the model takes x \(tensor\), rate"),
        (["x", "x"], "input 'x' is given twice"),
        (["I__0", "J__0"], "input 'J__0' is given twice"),
        (["I__0", "I__9999"], "no input 'I__9999'"),
        (["y" * 500], "no input 'yyy"),
    ],
)
def test_what_cannot_be_bound_is_named(names, message):
    """The answer names the input and what the model takes, and stays short."""
    with pytest.raises(Failed, match=message) as caught:
        bind(names, (X, RATE))
    assert caught.value.code == "invalid_argument"
    assert len(str(caught.value)) < 200


@given(st.lists(st.text(max_size=12), max_size=5))
def test_any_names_are_bound_or_refused(names):
    """Whatever a client calls its inputs, each is used once or the request is refused."""
    try:
        bound = bind(names, (X, MASK, RATE), [spec("a")])
    except Failed:
        return
    assert sorted(at for at in bound if at is not None) == list(range(len(names)))


def test_a_model_without_arguments_says_so():
    """There is nothing to name."""
    assert bind([], ()) == ()
    with pytest.raises(Failed, match="the model takes no inputs"):
        bind(["x"], ())


def test_only_what_is_known_is_reported():
    """A tensor's datatype is unknown without a manifest; scalars are known by the file."""
    assert merge((X, RATE), None) == ()
    assert merge((RATE, ODD), None) == (TensorSpec("rate", "INT64", (1,), optional=True),)
    listed = (spec("x"),)
    assert merge((X, RATE), listed) == (*listed, TensorSpec("rate", "INT64", (1,), optional=True))
    assert merge((X, MASK), (spec("INPUT__0"),)) == (spec("INPUT__0"),)


def test_a_manifest_that_lists_more_than_the_file_takes_is_refused():
    """Such a model could answer no request that suits its manifest."""
    with pytest.raises(Failed, match="the manifest does not suit the file") as caught:
        merge((X,), (spec("a"), spec("b")))
    assert caught.value.code == "model_failed"
