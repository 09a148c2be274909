"""Layouts as they are kept: after their own checksum, since an offset that is wrong by one bit is
a wrong answer, not an error. And parts of them, for those who need no more."""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from shared.layout import LAYOUT_VERSION, Block, Layout, Share, aligned, decode, encode

_SEAL: Final = 32


class Contents(msgspec.Struct, frozen=True):
    """Of a layout, how much memory the weights take, and where they lie in the file."""

    version: int
    obstacle: str | None = None
    blocks: tuple[Block, ...] = ()
    shares: tuple[Share, ...] = ()

    @property
    def weights_bytes(self) -> int:
        return sum(aligned(block.nbytes) for block in self.blocks)


_decode_contents = msgspec.msgpack.Decoder(Contents).decode


def seal(layout: Layout) -> bytes:
    data = encode(layout)
    return _checksum(data) + data


def open_layout(data: bytes) -> Layout | None:
    """None when it is damaged, or of another version of this program."""
    try:
        layout = decode(_unsealed(data))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return layout if layout.version == LAYOUT_VERSION else None


def open_contents(data: bytes) -> Contents | None:
    """None likewise."""
    try:
        contents = _decode_contents(_unsealed(data))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return contents if contents.version == LAYOUT_VERSION else None


def _unsealed(data: bytes) -> bytes:
    if data[:_SEAL] != _checksum(data[_SEAL:]):
        raise ValueError("the checksum is wrong")
    return data[_SEAL:]


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
