"""The data of a tensor as JSON: an array, flat or nested as the shape is, in row-major order."""

from __future__ import annotations

import re
from functools import cache
from itertools import chain
from typing import Any, Final

import msgspec
import numpy as np

from shared.errors import InvalidRequest, TooLarge
from shared.models import Datatype
from shared.tensors import NUMPY, Tensor, element_count, frame_bytes, split_bytes, to_numpy
from shared.v2.messages import Limits

_SMALL: Final = 64 * 1024
"""Arrays up to this many bytes of JSON are decoded and then counted; of longer ones the
elements are counted first, since decoded they take up to 16 times as much."""

_NESTED: Final = re.compile(rb"\[[ \t\r\n]*\[")
_STRING: Final = re.compile(rb'"[^"]*"')
_KIND: Final[dict[str, type]] = {"b": bool, "i": int, "u": int, "f": float}


def decode_data(
    where: str, datatype: Datatype, shape: tuple[int, ...], raw: bytes, limits: Limits
) -> bytes:
    """The tensor's data in wire format. `where` begins every message, e.g. `input 'x'`."""
    if datatype in {"FP16", "BF16"}:
        raise InvalidRequest(f"{where}: {datatype} via JSON is not supported, send it as binary")
    count = element_count(shape)
    most = limits.bytes_elements if datatype == "BYTES" else limits.json_elements
    if count > most:
        raise TooLarge(f"{where}: {count} elements in JSON, the limit is {most}; send it as binary")
    if raw[:1] != b"[":
        raise InvalidRequest(f"{where}: data must be an array")
    if len(raw) > _SMALL:
        _count_first(where, datatype, shape, count, raw)
    nested = _NESTED.match(raw) is not None
    kind = str if datatype == "BYTES" else _KIND[NUMPY[datatype].kind]
    try:
        values = _decoder(kind, max(1, len(shape)) if nested else 1).decode(raw)
    except (ValueError, RecursionError) as error:
        detail = str(error)[:200].replace("`", "").replace("at $[", "at data[")
        raise InvalidRequest(f"{where}: data does not suit {datatype}: {detail}") from None
    if nested:
        values = _flattened(where, shape, values)
    if len(values) != count:
        raise InvalidRequest(
            f"{where}: data has {len(values)} elements, shape {list(shape)} holds {count}"
        )
    if datatype == "BYTES":
        return frame_bytes(value.encode() for value in values)
    return _packed(where, datatype, values)


def encode_data(where: str, tensor: Tensor) -> list[Any]:
    """The tensor's elements, flat, for a JSON encoder. Raises `InvalidRequest` for what JSON
    cannot say, with the way out."""
    datatype = tensor.datatype
    if datatype in {"FP16", "BF16"}:
        raise InvalidRequest(f"{where}: {datatype} via JSON is not supported, ask for binary")
    if datatype == "BYTES":
        try:
            return [item.decode() for item in split_bytes(tensor.data)]
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"{where}: holds bytes that are not UTF-8, ask for binary"
            ) from None
    array = to_numpy(tensor)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidRequest(f"{where}: JSON has no NaN and no infinity, ask for binary")
    values: list[Any] = array.ravel().tolist()
    return values


@cache
def _decoder(kind: type, depth: int) -> msgspec.json.Decoder[Any]:
    wanted: Any = kind
    for _ in range(depth):
        wanted = list[wanted]
    return msgspec.json.Decoder(wanted)


def _count_first(
    where: str, datatype: Datatype, shape: tuple[int, ...], count: int, raw: bytes
) -> None:
    """Counts elements and brackets of a long array without decoding it."""
    wrong = f"{where}: data does not have the {count} elements that shape {list(shape)} holds"
    if datatype == "BYTES":  # what stands in strings does not count
        if b"\\" in raw:
            raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
        if raw.count(b'"') != 2 * count:
            raise InvalidRequest(wrong)
        raw = _STRING.sub(b"", raw)
    arrays = sum(element_count(shape[:axis]) for axis in range(len(shape)))
    if raw.count(b",") != count - 1 or raw.count(b"[") not in {1, arrays}:
        raise InvalidRequest(wrong)


def _flattened(where: str, shape: tuple[int, ...], values: list[Any]) -> list[Any]:
    """The elements of an array nested as `shape` is; raises when it is not."""
    level = [values]
    for axis, size in enumerate(shape):
        for part in level:
            if len(part) != size:
                raise InvalidRequest(
                    f"{where}: data has {len(part)} elements along dimension {axis}, "
                    f"shape {list(shape)} says {size}"
                )
        level = list(chain.from_iterable(level))
    return level


def _packed(where: str, datatype: Datatype, values: list[Any]) -> bytes:
    dtype = NUMPY[datatype]
    if dtype.kind in "iu":
        try:
            return np.array(values, dtype=dtype).tobytes()
        except OverflowError:
            low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
            index = next(i for i, value in enumerate(values) if not low <= value <= high)
            raise InvalidRequest(
                f"{where}: data[{index}] is outside {datatype}'s range of {low} to {high}"
            ) from None
    if dtype.kind == "b":
        return np.array(values, dtype=dtype).tobytes()
    with np.errstate(over="ignore"):
        array = np.array(values, dtype=np.float64).astype(dtype)
    if not np.isfinite(array).all():
        index = int(np.argmin(np.isfinite(array)))
        raise InvalidRequest(f"{where}: data[{index}] is outside the range of {datatype}")
    return array.tobytes()
