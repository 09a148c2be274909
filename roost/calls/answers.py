"""How answers are read. Each reader raises the `RoostError` that an answer tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import httpx
import msgspec

from roost.calls.call import Array, Ids, Item, Items
from roost.trust import why
from shared import v2
from shared.errors import STATUS, RoostError, Unavailable, from_code
from shared.models import Manifest
from shared.names import HEADER_CODE, HEADER_LENGTH
from shared.tensors import to_numpy

_CODES: Final = {status: code for code, status in STATUS.items()} | {500: "internal"}


def translate_error(answer: httpx.Response) -> RoostError:
    """The exception for an answer that is no success."""
    message = v2.error_message(answer.content) or f"HTTP {answer.status_code}"
    code = answer.headers.get(HEADER_CODE) or _CODES.get(answer.status_code, "internal")
    error = from_code(code, message)
    retry_after = answer.headers.get("retry-after", "")
    if retry_after.isdigit():
        error.retry_after_s = float(retry_after)
    return error


def no_answer(url: str, error: Exception) -> Unavailable:
    return Unavailable(f"no answer from {url}: {why(url, error)}")


def checked(answer: httpx.Response) -> httpx.Response:
    if not answer.is_success:
        raise translate_error(answer)
    return answer


def done(answer: httpx.Response) -> None:
    checked(answer)


def good(answer: httpx.Response) -> bool:
    """Whether the status is 200; raises nothing."""
    return answer.status_code == httpx.codes.OK


def item(answer: httpx.Response) -> Item:
    told: Item = checked(answer).json()
    return told


def index(answer: httpx.Response) -> Items:
    told: Items = checked(answer).json()
    return told


def items(key: str) -> Callable[[httpx.Response], Items]:
    """A reader of the list under `key`."""

    def read(answer: httpx.Response) -> Items:
        told: Items = item(answer)[key]
        return told

    return read


def released(answer: httpx.Response) -> Ids:
    told: Ids = item(answer)["released"]
    return told


def manifest(answer: httpx.Response) -> Manifest:
    return msgspec.json.decode(checked(answer).content, type=Manifest)


def arrays(answer: httpx.Response) -> dict[str, Array]:
    """The outputs of a v2 response, by name."""
    content = checked(answer).content
    length = v2.parse_header_length(answer.headers.get(HEADER_LENGTH))
    # The limit bounds what a server makes of strangers' bodies; this answer was asked for.
    limits = v2.Limits(body_bytes=max(len(content), v2.DEFAULT.body_bytes))
    response = v2.decode_response(content, length, limits)
    return {tensor.name: to_numpy(tensor) for tensor in response.outputs}
