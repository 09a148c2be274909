"""What is sent: inference requests, and files piece by piece."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from roost.calls.call import Array, Outputs, Progress
from shared import v2
from shared.errors import InvalidRequest
from shared.names import HEADER_LENGTH
from shared.tensors import from_numpy

_PIECE: Final = 1024 * 1024


class Body(NamedTuple):
    """A v2 request."""

    content: bytes
    headers: Mapping[str, str] = {}


def body_of(inputs: Mapping[str, Array], timeout_s: float | None, outputs: Outputs) -> Body:
    """All tensors travel as raw bytes."""
    request = v2.InferRequest(
        parameters={} if timeout_s is None else {"timeout": int(timeout_s * 1e6)},
        inputs=tuple(from_numpy(name, array) for name, array in inputs.items()),
        outputs=None if outputs is None else tuple(v2.RequestedOutput(o) for o in outputs),
        binary_default=True,
    )
    content, header_length = v2.encode_request(request)
    return Body(content, {} if header_length is None else {HEADER_LENGTH: str(header_length)})


def digest_of(path: Path) -> tuple[str, int]:
    """Of a file: `sha256:…` and its size in bytes."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return f"sha256:{digest}", file.tell()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error


def pieces_of(path: Path, size: int, progress: Progress | None) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece
            if progress is not None:
                progress(file.tell(), size)


async def read_aside(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """The same pieces, each read in a thread."""
    while piece := await asyncio.to_thread(next, pieces, b""):
        yield piece
