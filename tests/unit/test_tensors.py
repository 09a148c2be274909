"""Tensors: their sizes, BYTES framing, rows, and the way to numpy and back."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import InvalidRequest
from shared.models import Datatype
from shared.tensors import (
    ITEMSIZE,
    NUMPY,
    Tensor,
    check_bytes,
    element_count,
    frame_bytes,
    from_numpy,
    nbytes,
    split_bytes,
    split_rows,
    take_rows,
    to_numpy,
)


def test_sizes_follow_from_datatype_and_shape() -> None:
    """A scalar has one element, a zero dimension none, and BYTES no size of its own."""
    assert element_count(()) == 1
    assert element_count((3, 0)) == 0
    assert nbytes("BF16", (2, 3)) == 12
    with pytest.raises(ValueError, match="BYTES"):
        nbytes("BYTES", (1,))


@pytest.mark.parametrize("datatype", sorted(NUMPY))
def test_numbers_go_to_numpy_and_back(datatype: Datatype) -> None:
    """Each fixed-size datatype keeps values, shape and size, and is inferred from the dtype."""
    array = np.array([[0, 1, 1], [1, 0, 1]], dtype=NUMPY[datatype])
    tensor = from_numpy("x", array)
    assert (tensor.datatype, tensor.shape) == (datatype, (2, 3))
    assert len(tensor.data) == nbytes(datatype, (2, 3)) == 6 * (ITEMSIZE[datatype] or 0)
    np.testing.assert_array_equal(to_numpy(tensor), array)


def test_bytes_go_to_numpy_and_back() -> None:
    """BYTES takes bytes and text, empty and with zeros at the end, in any shape."""
    array = np.array([[b"a\0", ""], ["grüß", b"\xff"]], dtype=object)
    tensor = from_numpy("x", array)
    assert (tensor.datatype, tensor.shape) == ("BYTES", (2, 2))
    assert to_numpy(tensor).tolist() == [[b"a\0", b""], ["grüß".encode(), b"\xff"]]
    assert to_numpy(from_numpy("x", np.empty((0, 2), dtype=object))).shape == (0, 2)


def test_bf16_rounds_to_nearest_even() -> None:
    """Ties go to the even neighbour, overflow to infinity, and a NaN stays a NaN."""
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF])
    values = bits.astype("<u4").view("<f4")
    back = to_numpy(from_numpy("x", values, "BF16"))
    assert back[:4].view(np.uint32).tolist() == [0x3F800000, 0x3F800000, 0x3F820000, 0x7F800000]
    assert np.isnan(back[4:]).all()


def test_big_endian_and_strided_arrays_become_wire_order() -> None:
    """What travels is little-endian and row-major, whatever numpy held."""
    tensor = from_numpy("x", np.array([[1, 2], [3, 4]], dtype=">i2").T)
    assert tensor.datatype == "INT16"
    assert tensor.data == np.array([1, 3, 2, 4], dtype="<i2").tobytes()


@pytest.mark.parametrize(
    ("array", "datatype", "says"),
    [
        (np.array([1.5]), "INT32", "cannot become"),
        (np.array([300]), "UINT8", "from 0 to 255"),
        (np.array([-1]), "UINT64", "from 0 to"),
        (np.array([1]), "BYTES", "takes bytes or str"),
        (np.array([1], dtype=object), None, "got int"),
        (np.array([b"1"], dtype=object), "FP32", "cannot become"),
        (np.array([1j]), None, "no datatype"),
    ],
)
def test_values_that_would_change_are_refused(
    array: np.ndarray, datatype: Datatype | None, says: str
) -> None:
    """Conversion never truncates a number; the message names the tensor."""
    with pytest.raises(InvalidRequest, match=f"'x'.*{says}"):
        from_numpy("x", array, datatype)


def test_whole_numbers_that_fit_are_converted() -> None:
    """Plain Python numbers (int64) serve for any integer or float datatype."""
    assert to_numpy(from_numpy("x", np.array([255]), "UINT8")).tolist() == [255]
    assert to_numpy(from_numpy("x", np.array([2]), "FP32")).dtype == np.float32
    assert to_numpy(from_numpy("x", np.array([], dtype=np.int64), "INT8")).shape == (0,)


@pytest.mark.parametrize(
    "data", [b"\1", b"\1\0\0", b"\1\0\0\0", b"\2\0\0\0a", b"\xff\xff\xff\xffa", b"\0\0\0\0\0"]
)
def test_wrong_bytes_lengths_are_told(data: bytes) -> None:
    """A length prefix that is cut short or lies is an error that names the element."""
    with pytest.raises(InvalidRequest, match="element"):
        split_bytes(data)


def test_bytes_elements_are_counted() -> None:
    """Too many and too few elements are both told."""
    data = frame_bytes([b"a", b""])
    check_bytes(memoryview(data), 2)
    with pytest.raises(InvalidRequest, match="more than the 1"):
        check_bytes(data, 1)
    with pytest.raises(InvalidRequest, match="2 BYTES elements, the shape holds 3"):
        check_bytes(data, 3)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int32).reshape(4, 3),
        np.array([[b"a", b"bc"], [b"", b"d"], [b"e", b"f"], [b"gh", b""]], dtype=object),
        np.empty((4, 0), dtype=np.float32),
    ],
)
def test_rows_are_views_that_join_to_the_whole(array: np.ndarray) -> None:
    """Rows are taken from dimension 0 without copying, in BYTES tensors too."""
    tensor = from_numpy("x", array)
    np.testing.assert_array_equal(to_numpy(take_rows(tensor, 1, 3)), array[1:3])
    pieces = split_rows(tensor, [1, 0, 3])
    assert [piece.shape[0] for piece in pieces] == [1, 0, 3]
    assert b"".join(piece.data for piece in pieces) == tensor.data
    assert all(memoryview(piece.data).obj is tensor.data for piece in pieces)


def test_rows_that_are_not_there_are_refused() -> None:
    """Asking beyond the first dimension is a fault of the caller's own."""
    tensor = Tensor("x", "UINT8", (2,), b"ab")
    for start, stop in ((0, 3), (2, 1), (-1, 1)):
        with pytest.raises(ValueError, match="no rows"):
            take_rows(tensor, start, stop)
    with pytest.raises(ValueError, match="does not split"):
        split_rows(tensor, [1])
    with pytest.raises(ValueError, match="no rows"):
        take_rows(Tensor("s", "UINT8", (), b"a"), 0, 1)
