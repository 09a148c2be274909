"""What is inside a model file: its tensors by content, and what makes it the same program as
another. Told without torch, once, when the file is registered; kept beside the file."""

from __future__ import annotations

from typing import Final

import msgspec

LAYOUT_VERSION: Final = 2
"""Of what is written beside a file: a layout of another version is made anew."""
ALIGNMENT: Final = 512
"""Every block of a device begins at a multiple of it, as torch's own allocator has it."""


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of a local file. One after the other, extents make up a model's file, whose
    parts may lie in several: tensors that many models have are kept once."""

    path: str
    offset: int
    nbytes: int


class Block(msgspec.Struct, frozen=True, array_like=True):
    """One storage: bytes that are moved, shared and freed together."""

    digest: bytes
    """SHA-256 of the content."""
    offset: int
    """In the model's file, where it lies uncompressed."""
    nbytes: int


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """One tensor attribute of the program: a view into a block."""

    path: tuple[str, ...]
    """Attribute names, from the root module down."""
    block: int
    """Index into `Layout.blocks`."""
    dtype: str
    """torch's name for it, e.g. `bfloat16`."""
    start: int
    """First element, counted in elements."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""


class Share(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A part of the weights that is kept once by all models of a device that have it too."""

    key: str
    """16 hex digits, of the part's content."""
    nbytes: int
    """As it counts against a budget: each block rounded up to `ALIGNMENT`."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """A TorchScript file, taken apart.

    Two files of one `architecture` are the same program with other weights: same code, same
    constants, same attributes, same slots (in the same order) over blocks of the same sizes. So
    either's weights may stand in the other's loaded module, unless there is an `obstacle`.
    """

    version: int = LAYOUT_VERSION
    architecture: str = ""
    """64 hex digits; empty when it could not be told."""
    obstacle: str | None = None
    """Why the weights cannot be told apart from the program (quantized tensors, a
    `__setstate__`, tensors in lists, …): the file is loaded as it is."""
    may_write: bool = True
    """False: nothing in the code could write to an attribute or in place, so no analysis of
    the graph is needed. True: the graph must be asked."""
    blocks: tuple[Block, ...] = ()
    """In the order in which the slots need them. With an obstacle: what look like storages, which
    may be kept once on a disk, and on a device not."""
    slots: tuple[Slot, ...] = ()
    shares: tuple[Share, ...] = ()
    """At most 32, each at least a hundredth of the weights or so; what is in none is the model's
    own."""

    @property
    def weights_bytes(self) -> int:
        """What the blocks count against a device's budget."""
        return sum(aligned(block.nbytes) for block in self.blocks)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Layout)


def encode(layout: Layout) -> bytes:
    return _encoder.encode(layout)


def decode(data: bytes) -> Layout:
    """Raises `msgspec.MsgspecError`."""
    return _decoder.decode(data)
