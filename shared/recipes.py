"""How a file is put together from parts that other files may have too: its large tensors, each
by the digest of its content, and one part for all that lies between them."""

from __future__ import annotations

import bisect
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Annotated, BinaryIO, Final

import msgspec

from shared.errors import Internal
from shared.layout import Block, Extent

MIN_PART_BYTES: Final = 64 << 10
"""A smaller tensor is not worth a file of its own."""
MAX_PARTS: Final = 20_000
"""A file of more tensors is kept whole. BERT-base has 75 of such a size."""


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of the file, and where it is kept."""

    part: Annotated[str, msgspec.Meta(max_length=80)]
    """`sha256:…` of the part."""
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**60)]
    """In the part."""
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=2**60)]


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """The pieces one after the other are the file."""

    size: int
    pieces: Annotated[tuple[Piece, ...], msgspec.Meta(max_length=2 * MAX_PARTS + 1)]
    check: str
    """SHA-256 of the pieces as they are written here: the parts' names prove their contents, this
    proves their order."""
    version: int = 1

    @property
    def parts(self) -> dict[str, int]:
        """The distinct parts and their sizes, in the order in which they are needed."""
        sizes: dict[str, int] = {}
        for piece in self.pieces:
            sizes[piece.part] = max(sizes.get(piece.part, 0), piece.offset + piece.nbytes)
        return sizes


class Cut(msgspec.Struct, frozen=True):
    """A stretch of a file that is to be kept."""

    offset: int
    nbytes: int
    digest: str | None
    """None: it goes with the rest."""


_encode_pieces = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Recipe).decode


def cut(blocks: Iterable[Block], size: int) -> list[Cut] | None:
    """Where to cut a file of `size` bytes; None when nothing in it is worth it."""
    large = sorted(
        (block for block in blocks if block.nbytes >= MIN_PART_BYTES),
        key=lambda block: block.offset,
    )
    if not 0 < len(large) <= MAX_PARTS:
        return None
    cuts: list[Cut] = []
    at = 0
    for block in large:
        if block.offset < at or block.offset + block.nbytes > size:
            return None
        if block.offset > at:
            cuts.append(Cut(at, block.offset - at, None))
        cuts.append(Cut(block.offset, block.nbytes, f"sha256:{block.digest.hex()}"))
        at = block.offset + block.nbytes
    if at < size:
        cuts.append(Cut(at, size - at, None))
    return cuts


def write_recipe(cuts: Sequence[Cut], rest: str) -> Recipe:
    """`rest` is the digest of all cuts without one, one after the other."""
    pieces: list[Piece] = []
    at = 0
    for each in cuts:
        if each.digest is not None:
            pieces.append(Piece(each.digest, 0, each.nbytes))
        else:
            pieces.append(Piece(rest, at, each.nbytes))
            at += each.nbytes
    size = sum(piece.nbytes for piece in pieces)
    return Recipe(size=size, pieces=tuple(pieces), check=_check(pieces))


def encode_recipe(recipe: Recipe) -> bytes:
    return msgspec.json.encode(recipe)


def decode_recipe(path: str, data: bytes) -> Recipe:
    """Raises `Internal`, naming the file, when it is not as it was written."""
    try:
        recipe = _decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Internal(f"{path} is damaged: {error}") from error
    whole = sum(piece.nbytes for piece in recipe.pieces)
    if recipe.version != 1 or whole != recipe.size or recipe.check != _check(recipe.pieces):
        raise Internal(f"{path} is damaged, or was written by a newer Roost")
    return recipe


def _check(pieces: Sequence[Piece]) -> str:
    return hashlib.sha256(_encode_pieces(pieces)).hexdigest()


def extents(recipe: Recipe, paths: dict[str, str]) -> tuple[Extent, ...]:
    """Where the file lies, given where its parts do."""
    found: list[Extent] = []
    for piece in recipe.pieces:
        path = paths[piece.part]
        last = found[-1] if found else None
        if last is not None and last.path == path and last.offset + last.nbytes == piece.offset:
            found[-1] = Extent(path, last.offset, last.nbytes + piece.nbytes)
        else:
            found.append(Extent(path, piece.offset, piece.nbytes))
    return tuple(found)


class Assembled(io.RawIOBase):
    """The file itself, for reading. Parts are opened as they are needed, few at a time."""

    def __init__(self, pieces: Sequence[Piece], open_part: Callable[[str], BinaryIO]) -> None:
        self._pieces = pieces
        self._starts = [0, *accumulate(piece.nbytes for piece in pieces)]
        self._open_part = open_part
        self._at = 0
        self._parts: dict[str, BinaryIO] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._starts[-1]}[whence]
        if base + offset < 0:
            raise ValueError("seek to before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        if self._at >= self._starts[-1] or not view:
            return 0
        number = bisect.bisect_right(self._starts, self._at) - 1
        piece = self._pieces[number]
        inside = self._at - self._starts[number]
        part = self._part(piece.part)
        part.seek(piece.offset + inside)
        data = part.read(min(len(view), piece.nbytes - inside))
        if not data:
            raise Internal(f"the part {piece.part} is damaged: it is too short")
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _part(self, digest: str) -> BinaryIO:
        part = self._parts.pop(digest, None) or self._open_part(digest)
        self._parts[digest] = part  # the latest last
        if len(self._parts) > 4:
            self._parts.pop(next(iter(self._parts))).close()
        return part

    def close(self) -> None:
        while self._parts:
            self._parts.popitem()[1].close()
        super().close()


def chunks(file: BinaryIO, cuts: Iterable[Cut], nbytes: int = 4 << 20) -> Iterator[bytes]:
    """The contents of these cuts, one after the other."""
    for each in cuts:
        file.seek(each.offset)
        left = each.nbytes
        while left:
            data = file.read(min(left, nbytes))
            if not data:
                raise Internal("the file became shorter while it was read")
            left -= len(data)
            yield data


def read_extents(file: Sequence[Extent]) -> BinaryIO:
    """A local file in several stretches, for reading as one."""
    pieces = [Piece(extent.path, extent.offset, extent.nbytes) for extent in file]
    raw = Assembled(pieces, lambda path: open(path, "rb"))  # noqa: PTH123, SIM115
    return io.BufferedReader(raw, 1 << 16)
