"""Tensors as the Open Inference Protocol frames them, and numpy's view of them.

The bytes of a tensor are row-major and little-endian. BYTES is the one datatype without a fixed
size: each element is its length (4 bytes, little-endian, unsigned) and then its bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidRequest
from shared.models import Datatype

ITEMSIZE: Final[dict[Datatype, int | None]] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "FP32": 4,
    "FP64": 8,
    "BF16": 2,
    "BYTES": None,
}
"""Bytes per element; None where elements differ in size."""

NUMPY: Final[dict[Datatype, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""numpy's dtype on the wire. BF16 and BYTES have none."""

_LENGTH: Final = struct.Struct("<I")
_DATATYPE_OF: Final[dict[str, Datatype]] = {d.newbyteorder("=").name: t for t, d in NUMPY.items()}


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """One named tensor. `data` may be a view into the message it came in, and then keeps all of
    that message alive; copy it to keep it longer than the request."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    data: bytes | memoryview


def shown(name: str) -> str:
    """A name as it may stand in a message: quoted, escaped, never long."""
    return repr(name if len(name) <= 64 else name[:61] + "...")


def element_count(shape: tuple[int, ...]) -> int:
    """How many elements a shape of dimensions ≥ 0 holds. A scalar's shape `()` holds one."""
    return math.prod(shape)


def nbytes(datatype: Datatype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises `ValueError` for BYTES, whose shape does not say."""
    itemsize = ITEMSIZE[datatype]
    if itemsize is None:
        raise ValueError("the size of a BYTES tensor does not follow from its shape")
    return math.prod(shape) * itemsize


# --- BYTES --------------------------------------------------------------------------------


def frame_bytes(items: Iterable[bytes]) -> bytes:
    """The data of a BYTES tensor with these elements."""
    return b"".join(part for item in items for part in (_LENGTH.pack(len(item)), item))


def split_bytes(data: bytes | memoryview) -> list[bytes]:
    """The elements of a BYTES tensor's data. Raises `InvalidRequest` on a wrong length."""
    return [bytes(data[end - size : end]) for end, size in _elements(data)]


def check_bytes(data: bytes | memoryview, count: int) -> None:
    """Raises `InvalidRequest` unless BYTES data hold exactly `count` whole elements."""
    found = 0
    for _ in _elements(data):
        found += 1
        if found > count:  # the rest may be millions: it is not visited
            raise InvalidRequest(f"more than the {count} BYTES elements that the shape holds")
    if found != count:
        raise InvalidRequest(f"{found} BYTES elements, the shape holds {count}")


def _elements(data: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """End offset and size of each element in turn."""
    end = len(data)
    at = index = 0
    while at < end:
        if end - at < 4:
            raise InvalidRequest(
                f"the length of BYTES element {index} should have 4 bytes, {end - at} are left"
            )
        size: int = _LENGTH.unpack_from(data, at)[0]
        at += 4 + size
        if at > end:
            raise InvalidRequest(
                f"BYTES element {index} claims {size} bytes, {size - (at - end)} are left"
            )
        yield at, size
        index += 1


# --- rows ---------------------------------------------------------------------------------


def take_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` to before `stop` of dimension 0, without copying.

    Raises `ValueError` when the tensor has no such rows.
    """
    if not tensor.shape or not 0 <= start <= stop <= tensor.shape[0]:
        raise ValueError(f"{tensor.name!r} of shape {tensor.shape} has no rows {start}:{stop}")
    (taken,) = _cut(tensor, [start, stop])
    return taken


def split_rows(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Consecutive pieces of `sizes` rows each, together the whole of dimension 0, uncopied.

    Raises `ValueError` when the sizes do not add up to it.
    """
    if not tensor.shape or sum(sizes) != tensor.shape[0] or any(size < 0 for size in sizes):
        raise ValueError(f"{tensor.name!r} of shape {tensor.shape} does not split into {sizes}")
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return _cut(tensor, edges)


def _cut(tensor: Tensor, edges: list[int]) -> list[Tensor]:
    """The pieces between neighbouring edges, which are ascending row numbers."""
    per_row = math.prod(tensor.shape[1:])
    itemsize = ITEMSIZE[tensor.datatype]
    if itemsize is None:
        ends = [0, *(end for end, _ in _elements(tensor.data))]
        offsets = [ends[edge * per_row] for edge in edges]
    else:
        offsets = [edge * per_row * itemsize for edge in edges]
    view = memoryview(tensor.data)
    return [
        Tensor(
            tensor.name,
            tensor.datatype,
            (edges[i + 1] - edges[i], *tensor.shape[1:]),
            view[offsets[i] : offsets[i + 1]],
        )
        for i in range(len(edges) - 1)
    ]


# --- numpy --------------------------------------------------------------------------------


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The tensor as an array of its shape: BF16 as float32, BYTES as an object array of bytes.

    All others are read-only views of `tensor.data`, which need not be aligned.
    """
    if tensor.datatype == "BYTES":
        items = np.empty(element_count(tensor.shape), dtype=object)
        items[:] = split_bytes(tensor.data)
        return items.reshape(tensor.shape)
    if tensor.datatype == "BF16":
        high = np.frombuffer(tensor.data, dtype="<u2").astype(np.uint32)
        return (high << np.uint32(16)).view(np.float32).reshape(tensor.shape)
    return np.frombuffer(tensor.data, dtype=NUMPY[tensor.datatype]).reshape(tensor.shape)


def from_numpy(name: str, array: NDArray[Any], datatype: Datatype | None = None) -> Tensor:
    """A tensor of the array's values.

    The datatype follows from the array's dtype unless given; then the values are converted:
    floats may lose precision (to BF16 they round to nearest even), whole numbers must fit.
    BYTES takes bytes, or str as UTF-8. Raises `InvalidRequest` for what cannot be converted.
    """
    array = np.asarray(array)
    target = datatype or _datatype_of(name, array)
    if target == "BYTES":
        if array.dtype.kind not in "OSU":
            raise InvalidRequest(f"tensor {shown(name)}: BYTES takes bytes or str")
        data = frame_bytes(_as_bytes(name, item) for item in array.ravel().tolist())
    elif target == "BF16":
        data = _bfloat16(name, array).tobytes()
    else:
        data = _converted(name, array, NUMPY[target]).tobytes()
    return Tensor(name, target, array.shape, data)


def _datatype_of(name: str, array: NDArray[Any]) -> Datatype:
    if array.dtype.kind in "OSU":
        return "BYTES"
    # ml_dtypes' type, known by its name, so that we need not have that package.
    found = "BF16" if array.dtype.name == "bfloat16" else _DATATYPE_OF.get(array.dtype.name)
    if found is None:
        raise InvalidRequest(f"tensor {shown(name)}: no datatype for numpy's {array.dtype}")
    return found


def _as_bytes(name: str, item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        return item.encode()
    raise InvalidRequest(
        f"tensor {shown(name)}: BYTES takes bytes or str, got {type(item).__name__}"
    )


def _converted(name: str, array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if array.dtype == dtype:
        return array
    if dtype.kind in "iu" and array.dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if array.size and not limits.min <= int(array.min()) <= int(array.max()) <= limits.max:
            raise InvalidRequest(
                f"tensor {shown(name)}: values must be from {limits.min} to {limits.max}"
            )
    elif array.dtype.kind == "O" or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise InvalidRequest(
            f"tensor {shown(name)}: numpy's {array.dtype} cannot become {dtype.name}"
        )
    with np.errstate(over="ignore"):  # a float beyond the range becomes infinite, as in torch
        return array.astype(dtype)


def _bfloat16(name: str, array: NDArray[Any]) -> NDArray[np.uint16]:
    """The high halves of float32, rounded to nearest even."""
    if array.dtype.name == "bfloat16":
        return array.view(np.uint16).astype("<u2")
    bits = np.ascontiguousarray(_converted(name, array, np.dtype("<f4"))).view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN over into zero or infinity; keep it a (quiet) NaN.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet, rounded).astype("<u2")
