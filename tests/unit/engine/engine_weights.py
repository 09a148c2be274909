"""Files full of blocks with layouts made by hand, for tests of the engine's memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from services.worker.engine.files import ScatteredFile
from shared.layout import Block, Extent, Layout, Slot

GAP = 37
"""Bytes between two blocks, as a zip's headers would stand there."""


class Weights:
    """A model's file with these blocks, each seen by one slot of bytes."""

    def __init__(self, folder: Path, name: str, blocks: Sequence[bytes]) -> None:
        self.contents = tuple(blocks)
        self.path = folder / name
        offsets, data = [], b""
        for content in blocks:
            data += b"\xee" * GAP
            offsets.append(len(data))
            data += content
        self.path.write_bytes(data)
        self.layout = Layout(
            blocks=tuple(
                Block(hashlib.sha256(content).digest(), offset, len(content))
                for content, offset in zip(blocks, offsets, strict=True)
            ),
            slots=tuple(
                Slot((f"b{index}",), index, "uint8", 0, (len(content),), (1,))
                for index, content in enumerate(blocks)
            ),
        )
        self.file = ScatteredFile([Extent(str(self.path), 0, len(data))])


def noise(seed: int, nbytes: int) -> bytes:
    """Bytes that no other seed has."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(nbytes)


def anonymous_bytes() -> int:
    """What this process takes of the machine's memory, without files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024
