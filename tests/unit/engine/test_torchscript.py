from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.torchscript import Inputs, arguments_of, forward_of  # noqa: E402
from tests.unit.engine import engine_models as models  # noqa: E402
from tests.unit.engine import program_harness as harness  # noqa: E402

pytestmark = pytest.mark.torch


def inputs_of(module, tmp_path) -> Inputs:
    path = harness.scripted(module, tmp_path / "m.pt")
    schema = arguments_of(forward_of(torch.jit.load(str(path))._c).schema)
    return Inputs(schema, None, harness.CPU)


def test_arguments_are_told_by_the_file(tmp_path):
    """With their kinds and defaults."""
    path = harness.scripted(models.Counter(), tmp_path / "m.pt")
    schema = arguments_of(forward_of(torch.jit.load(str(path))._c).schema)
    assert [(each.name, each.kind, each.optional) for each in schema] == [
        ("step", "int", False),
        ("scale", "float", True),
        ("negate", "bool", True),
    ]


def test_numbers_and_texts_are_taken_out_of_inputs(tmp_path):
    """What an argument is decides what the input becomes."""
    counter = inputs_of(models.Counter(), tmp_path)
    given = [("step", torch.tensor([3])), ("negate", torch.tensor([1]))]
    assert counter.arguments(given) == [3, 1.0, True]
    texts = inputs_of(models.Texts(), tmp_path)
    assert texts.arguments([("texts", [b"a", b"b"])]) == [["a", "b"], ""]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([("step", torch.tensor([1, 2]))], "one value"),
        ([("step", torch.tensor([0.5]))], "whole number"),
        ([("step", [b"1"])], "a number"),
        ([("step", torch.tensor([1])), ("negate", torch.tensor([2]))], "true or false"),
        ([("stop", torch.tensor([1]))], "no input"),
        ([], "missing"),
    ],
)
def test_inputs_that_do_not_suit_are_the_callers_fault(given, told, tmp_path):
    """The error names the input and what the model takes."""
    counter = inputs_of(models.Counter(), tmp_path)
    with pytest.raises(Failed, match=told) as caught:
        counter.arguments(given)
    assert caught.value.code == "invalid_argument"
