"""Request bodies: read against every limit at once, and decompressed within one.

A client may send slowly, endlessly, more than it said, or something that unpacks to far more
than it weighs. Each is bounded here: one deadline for the whole body, a count while it streams,
and room in memory that is taken piece by piece and given back by `Held.release`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, ClassVar, Final

from services.gateway.core.admission import Admission
from services.gateway.core.quotas import Rejection
from shared.errors import InvalidRequest, Overloaded, RoostError, TooLarge

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""ASGI's receive."""

_INLINE_BYTES: Final = 64 * 1024
"""Smaller bodies are decompressed on the spot: a thread costs more."""
_WBITS: Final = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


class SlowBody(RoostError):
    """The body did not arrive within its time."""

    code: ClassVar[str] = "request_timeout"
    retryable: ClassVar[bool] = True


class Rejected(Overloaded):
    """Admission said no."""

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.message, retry_after_s=rejection.retry_after_s)
        self.reason = rejection.reason


class Held:
    """The room that one request's body takes in memory."""

    __slots__ = ("_admission", "_nbytes", "_tenant")

    def __init__(self, admission: Admission, tenant: str = "") -> None:
        self._admission = admission
        self._tenant = tenant
        self._nbytes = 0

    def grow(self, nbytes: int) -> None:
        """Raises `Rejected` when the gateway, or the tenant, holds too much already."""
        rejection = self._admission.hold(nbytes, self._tenant)
        if rejection is not None:
            raise Rejected(rejection)
        self._nbytes += nbytes

    def release(self) -> None:
        self._admission.drop(self._nbytes, self._tenant)
        self._nbytes = 0


async def read_body(
    receive: Receive,
    headers: dict[bytes, bytes],
    held: Held,
    *,
    limit_bytes: int,
    timeout_s: float,
) -> bytes:
    """The whole body, decompressed.

    Raises `TooLarge` (already from the Content-Length, before reading), `InvalidRequest` (bad
    encoding), `Rejected`, `SlowBody`, `ClientGone`.
    """
    declared = headers.get(b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit_bytes:
        raise TooLarge(f"the body has {int(declared)} bytes, the limit is {limit_bytes}")
    try:
        async with asyncio.timeout(timeout_s):
            message = await receive()
            body: bytes = message.get("body", b"")
            if message.get("more_body") or message["type"] != "http.request":
                body = await _read_on(receive, message, held, limit_bytes)
            else:
                held.grow(len(body))
    except TimeoutError:
        raise SlowBody(f"the body did not arrive within {timeout_s:g} s") from None
    if len(body) > limit_bytes:
        raise _too_large(limit_bytes)
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    if encoding in {b"", b"identity"}:
        return body
    return await decompressed(body, encoding, held, limit_bytes)


async def _read_on(
    receive: Receive, message: MutableMapping[str, Any], held: Held, limit_bytes: int
) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        if message["type"] != "http.request":
            raise ClientGone
        piece = message.get("body", b"")
        if piece:
            size += len(piece)
            if size > limit_bytes:
                raise _too_large(limit_bytes)
            held.grow(len(piece))
            pieces.append(piece)
        if not message.get("more_body"):
            return b"".join(pieces)
        message = await receive()


async def decompressed(body: bytes, encoding: bytes, held: Held | None, limit_bytes: int) -> bytes:
    """The body, unpacked, counted in `held` if given. Raises as `read_body`."""
    wbits = _WBITS.get(encoding)
    if wbits is None:
        shown = encoding[:40].decode("latin-1")
        raise InvalidRequest(
            f"Content-Encoding {shown!r} is not understood: gzip, deflate or identity"
        )
    if len(body) <= _INLINE_BYTES:
        plain = _inflate(body, wbits, limit_bytes)
    else:
        plain = await asyncio.to_thread(_inflate, body, wbits, limit_bytes)
    if held is not None:
        held.grow(len(plain))
    return plain


def _inflate(body: bytes, wbits: int, limit_bytes: int) -> bytes:
    stream = zlib.decompressobj(wbits)
    try:
        plain = stream.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the compressed body is malformed: {error}") from None
    if len(plain) > limit_bytes:
        raise TooLarge(f"the decompressed body is over the limit of {limit_bytes} bytes")
    if not stream.eof:
        raise InvalidRequest("the compressed body is truncated")
    if stream.unused_data:
        raise InvalidRequest("the compressed body has bytes after its end")
    return plain


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"the body is over the limit of {limit_bytes} bytes")


async def stream_body(
    receive: Receive, *, limit_bytes: int, timeout_s: float, piece_bytes: int = 1024 * 1024
) -> AsyncIterator[bytes]:
    """A long body in pieces of about `piece_bytes`, each read only when asked for, so that a
    slow disk slows the sender. `timeout_s` is for each piece, so a trickle ends too.

    Raises `TooLarge`, `SlowBody`, `ClientGone`.
    """
    size = 0
    more = True
    while more:
        pieces: list[bytes] = []
        gathered = 0
        try:
            async with asyncio.timeout(timeout_s):
                while more and gathered < piece_bytes:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise ClientGone
                    piece = message.get("body", b"")
                    gathered += len(piece)
                    pieces.append(piece)
                    more = bool(message.get("more_body"))
        except TimeoutError:
            raise SlowBody(f"less than {piece_bytes} bytes arrived in {timeout_s:g} s") from None
        size += gathered
        if size > limit_bytes:
            raise TooLarge(f"the upload is over the limit of {limit_bytes} bytes")
        if gathered:
            yield b"".join(pieces)
