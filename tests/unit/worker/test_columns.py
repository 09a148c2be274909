"""A batch's inputs in shared memory, and its outputs back at those who asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.answers import parts
from services.worker.arena import ALIGNMENT, aligned
from services.worker.columns import copy, gather, length_of, nbytes
from services.worker.core.events import Answer
from shared.errors import InvalidRequest
from shared.models import ModelSpec, Padding, TensorSpec
from shared.names import model_id
from shared.tensors import NUMPY, Tensor, from_numpy, to_numpy
from shared.v2 import InferRequest

PADDING = Padding(
    inputs={"ids": 0, "mask": 0}, sizes=(4, 8), values={"ids": 7}, outputs={"states": 0}
)
SPEC = ModelSpec(
    inputs=(TensorSpec("ids", "INT64", (-1,)), TensorSpec("mask", "BOOL", (-1,))),
    max_batch_size=8,
    padding=PADDING,
)


def request(*lengths: int) -> InferRequest:
    """One row of each length; they must be equal."""
    rows, length = len(lengths), lengths[0]
    ids = np.arange(rows * length, dtype="i8").reshape(rows, length) + 100
    return InferRequest(
        inputs=(
            from_numpy("ids", ids),
            from_numpy("mask", np.ones((rows, length), "?")),
        )
    )


def laid(requests: list[InferRequest], padding: Padding | None, size: int) -> dict[str, Tensor]:
    """What the engine finds."""
    columns = gather(requests, padding, size)
    memory = memoryview(bytearray(b"\xee" * (nbytes(columns) + 64)))
    refs = copy(columns, memory, 64)
    assert all(ref.offset % ALIGNMENT == 0 for ref in refs)
    assert sum(aligned(ref.nbytes) for ref in refs) == nbytes(columns)
    return {
        ref.name: Tensor(
            ref.name, ref.datatype, ref.shape, bytes(memory[ref.offset : ref.offset + ref.nbytes])
        )
        for ref in refs
    }


def test_rows_of_several_requests_stand_one_after_the_other():
    """In whatever order each request names its inputs."""
    one, two = request(3), request(3, 3)
    two = InferRequest(inputs=two.inputs[::-1])
    found = laid([one, two], None, 0)
    assert to_numpy(found["ids"]).tolist() == [[100, 101, 102], [100, 101, 102], [103, 104, 105]]


def test_bytes_are_laid_down_as_they_are():
    """Their elements differ in size."""
    text = InferRequest(inputs=(from_numpy("t", np.array([["a", "bcd"]], object)),))
    assert to_numpy(laid([text, text], None, 0)["t"]).tolist() == [[b"a", b"bcd"]] * 2


def test_shorter_requests_are_filled_up():
    """With each input's own value, 0 where none is said; the mask tells what was put in."""
    found = laid([request(2), request(4, 4)], PADDING, 4)
    assert to_numpy(found["ids"]).tolist() == [
        [100, 101, 7, 7],
        [100, 101, 102, 103],
        [104, 105, 106, 107],
    ]
    assert to_numpy(found["mask"]).tolist() == [[True, True, False, False]] + [[True] * 4] * 2
    alone = laid([request(5)], PADDING, 8)
    assert to_numpy(alone["ids"]).tolist() == [[100, 101, 102, 103, 104, 7, 7, 7]]


def test_what_is_not_padded_stays_as_it_is():
    """An input without the dimension, beside those that have it; a request of the very size."""
    extra = from_numpy("scale", np.array([[2.0]], "f4"))
    found = laid([InferRequest(inputs=(*request(4).inputs, extra))], PADDING, 4)
    assert to_numpy(found["scale"]).tolist() == [[2.0]]
    assert to_numpy(found["ids"]).tolist() == [[100, 101, 102, 103]]
    assert to_numpy(laid([request(9)], PADDING, 9)["mask"]).shape == (1, 9)


def test_bfloat16_and_float16_are_filled_up_with_their_own_numbers():
    """The value is converted once, to the input's datatype."""
    for datatype in ("BF16", "FP16"):
        padding = Padding(inputs={"x": 0}, sizes=(4,), values={"x": -1.5})
        x = from_numpy("x", np.ones((1, 2), "f4"), datatype)
        found = laid([InferRequest(inputs=(x,))], padding, 4)["x"]
        assert to_numpy(found).tolist() == [[1.0, 1.0, -1.5, -1.5]]


@given(
    st.sampled_from(sorted(NUMPY)),
    st.lists(st.integers(0, 3), max_size=2),
    st.lists(st.integers(0, 3), max_size=2),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=4),
)
def test_filling_up_is_what_numpy_makes_of_it(datatype, before, behind, requests):
    """In any dimension, also where there is nothing at all."""
    padding = Padding(inputs={"x": len(before)}, sizes=(5,), values={"x": 1})
    shapes = [(rows, *before, length, *behind) for rows, length in requests]
    arrays = [np.zeros(shape, NUMPY[datatype]) for shape in shapes]
    asked = [InferRequest(inputs=(from_numpy("x", a, datatype),)) for a in arrays]
    axis = len(before) + 1
    want = [
        np.pad(a, [(0, 5 - a.shape[axis] if i == axis else 0) for i in range(a.ndim)],
               constant_values=1)
        for a in arrays
    ]  # fmt: skip
    found = to_numpy(laid(asked, padding, 5)["x"])
    np.testing.assert_array_equal(found, np.concatenate(want))


def test_the_inputs_of_a_request_are_of_one_length():
    """Or it is told which are not."""
    ids, mask = request(3).inputs[0], request(4).inputs[1]
    assert length_of(request(3), PADDING) == 3
    with pytest.raises(InvalidRequest, match="'ids' and 'mask' must be of one length"):
        length_of(InferRequest(inputs=(ids, mask)), PADDING)


# --- outputs ------------------------------------------------------------------------------


def answer(*rows: int, whole: bool = False) -> Answer:
    items = tuple(range(1, len(rows) + 1))
    return Answer(1, model_id("m", 1), items, rows, whole, 0.01)


def test_every_item_gets_its_rows_at_its_own_length():
    """What was filled up is cut off; outputs without the dimension keep theirs."""
    states = np.arange(3 * 4 * 2, dtype="f4").reshape(3, 4, 2)
    pooled = np.arange(3, dtype="f4").reshape(3, 1)
    outputs = [from_numpy("states", states), from_numpy("pooled", pooled)]
    found = parts(outputs, answer(1, 2), [request(2), request(4, 4)], SPEC)
    np.testing.assert_array_equal(to_numpy(found[0][0]), states[:1, :2])
    np.testing.assert_array_equal(to_numpy(found[1][0]), states[1:])
    assert [to_numpy(part[1]).tolist() for part in found] == [[[0.0]], [[1.0], [2.0]]]


def test_an_output_is_cut_in_any_dimension():
    """E.g. scores by position stand last."""
    padding = Padding(inputs={"ids": 0}, sizes=(4,), outputs={"scores": 1})
    spec = ModelSpec(inputs=SPEC.inputs, max_batch_size=8, padding=padding)
    scores = np.arange(2 * 3 * 4, dtype="i4").reshape(2, 3, 4)
    found = parts([from_numpy("scores", scores)], answer(1, 1), [request(3), request(0)], spec)
    np.testing.assert_array_equal(to_numpy(found[0][0]), scores[:1, :, :3])
    assert found[1][0].shape == (1, 3, 0)


def test_the_outputs_of_a_model_that_does_not_batch_are_whole():
    """Nothing is parted, whatever their shapes."""
    outputs = [from_numpy("y", np.zeros((), "f4"))]
    assert parts(outputs, answer(1, whole=True), [request(1)], ModelSpec()) == [outputs]


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        ([], "no output 'states'"),
        ([from_numpy("states", np.zeros((1, 3, 2), "f4"))], "should be the 4"),
        ([from_numpy("states", np.zeros((1,), "f4"))], "should be the 4"),
        ([from_numpy("states", np.full((1, 4), "a", object))], "BYTES"),
        ([from_numpy("states", np.zeros((2, 4), "f4"))], "does not split"),
    ],
)
def test_outputs_that_are_not_as_declared_are_no_answer(outputs, why):
    """Also where nothing would have to be cut."""
    for length in (3, 4):
        with pytest.raises(ValueError, match=why):
            parts(outputs, answer(1), [request(length)], SPEC)
