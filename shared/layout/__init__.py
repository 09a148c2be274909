"""Model files taken apart: tensors by content, programs by architecture. No torch."""

from shared.layout.model import (
    ALIGNMENT,
    LAYOUT_VERSION,
    Block,
    Extent,
    Layout,
    Share,
    Slot,
    aligned,
    decode,
    encode,
)

__all__ = [
    "ALIGNMENT",
    "LAYOUT_VERSION",
    "Block",
    "Extent",
    "Layout",
    "Share",
    "Slot",
    "aligned",
    "decode",
    "encode",
]
