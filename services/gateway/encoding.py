"""Compressed answers, for the clients that ask for them.

Only inference answers are compressed: Triton's asyncio client says that it takes gzip with every
request, and unpacks nothing else. Most HTTP libraries name all codings they know with every
request; that is an offer, and over a fast network the bytes cost less than the compressing. So
an answer is compressed when exactly one coding is asked for, which somebody has set on purpose.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Final

_WBITS: Final = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
_LEVEL: Final = 1
"""Tensors hardly shrink more at higher ones."""
_LEAST_BYTES: Final = 256
"""Smaller answers only grow."""
_INLINE_BYTES: Final = 64 * 1024


def wanted_coding(accept_encoding: bytes | None) -> bytes | None:
    """`gzip` or `deflate` when the header asks for it alone, else None: identity, which HTTP
    allows unless it is refused."""
    if not accept_encoding:
        return None
    chosen: bytes | None = None
    for item in accept_encoding.lower().split(b","):
        coding, _, parameters = item.strip().partition(b";")
        coding = coding.strip()
        if coding in {b"", b"identity"} or _is_zero(parameters):
            continue
        if chosen is not None:
            return None
        chosen = coding
    return chosen if chosen in _WBITS else None


def _is_zero(parameters: bytes) -> bool:
    name, _, value = parameters.strip().partition(b"=")
    return name.strip() == b"q" and not value.strip().strip(b"0.")


async def compressed(body: bytes, coding: bytes) -> bytes | None:
    """The body in this coding; None when it is better sent as it is."""
    if len(body) < _LEAST_BYTES:
        return None
    if len(body) <= _INLINE_BYTES:
        return _deflate(body, _WBITS[coding])
    return await asyncio.to_thread(_deflate, body, _WBITS[coding])


def _deflate(body: bytes, wbits: int) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, wbits)
    return packer.compress(body) + packer.flush()
