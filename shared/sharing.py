"""How many bytes models have in common: what sharing tensors by content saves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.layout import Block
from shared.models import Manifest
from shared.names import ModelId

_TAG: Final = np.dtype("<u8")
LOOK_AGAIN_S: Final = 300.0
"""So long a file is taken to have no layout: a worker that loads an old file makes one."""


class SharedBytes(msgspec.Struct, frozen=True):
    """A model's file, divided."""

    own_bytes: int
    shared_bytes: int
    """In tensors that another registered model has too."""


class _Tensors(msgspec.Struct, frozen=True):
    """Of one file: the distinct contents and their bytes. Eight bytes of a digest are enough to
    count by."""

    tags: NDArray[np.uint64]
    nbytes: NDArray[np.int64]


class Sharing:
    """Counts for thousands of models: layouts are read once, counting is one pass of numpy over
    all tensors, and done anew only when something was registered or removed."""

    def __init__(
        self,
        read_blocks: Callable[[Iterable[str]], dict[str, tuple[Block, ...]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_blocks = read_blocks
        self._clock = clock
        self._missed: dict[str, float] = {}
        """Files without a layout, and when that was seen."""
        self._files: dict[str, _Tensors] = {}
        self._counted: tuple[object, dict[ModelId, SharedBytes]] = (None, {})

    def count(self, manifests: Sequence[Manifest]) -> dict[ModelId, SharedBytes]:
        """A file without a layout counts as one tensor."""
        sizes = {manifest.digest: manifest.size_bytes for manifest in manifests}
        known = {digest: self._files[digest] for digest in sizes if digest in self._files}
        now = self._clock()
        missed = {
            digest: at
            for digest, at in self._missed.items()
            if digest in sizes and now - at < LOOK_AGAIN_S
        }
        unread = sizes.keys() - known.keys() - missed.keys()
        if unread:
            for digest, blocks in self._read_blocks(unread).items():
                known[digest] = _tensors(blocks)
            missed |= dict.fromkeys(unread - known.keys(), now)
        self._files, self._missed = known, missed
        models = Counter(manifest.digest for manifest in manifests)
        basis = (known.keys(), [(manifest.id, manifest.digest) for manifest in manifests])
        if basis != self._counted[0]:
            files = {
                digest: known.get(digest) or _whole(digest, size) for digest, size in sizes.items()
            }
            shared = _shared_bytes(files, models)
            told = {
                manifest.id: _divided(manifest.size_bytes, shared[manifest.digest])
                for manifest in manifests
            }
            self._counted = (basis, told)
        return self._counted[1]


def _tensors(blocks: Iterable[Block]) -> _Tensors:
    nbytes: Counter[bytes] = Counter()
    for block in blocks:
        nbytes[block.digest[:8]] += block.nbytes
    return _Tensors(
        np.frombuffer(b"".join(nbytes), _TAG), np.fromiter(nbytes.values(), np.int64, len(nbytes))
    )


def _whole(digest: str, size: int) -> _Tensors:
    tag = bytes.fromhex(digest.removeprefix("sha256:"))[:8]
    return _Tensors(np.frombuffer(tag, _TAG), np.array([size], np.int64))


def _shared_bytes(files: dict[str, _Tensors], models: Counter[str]) -> dict[str, int]:
    """By digest. `models` says how many models have each file."""
    if not files:
        return {}
    lengths = [len(each.tags) for each in files.values()]
    number = np.repeat(np.arange(len(files)), lengths)
    nbytes = np.concatenate([each.nbytes for each in files.values()])
    tags = np.concatenate([each.tags for each in files.values()])
    _, tag = np.unique(tags, return_inverse=True)
    holders = np.bincount(tag, weights=np.repeat([models[digest] for digest in files], lengths))
    shared = np.bincount(number, weights=nbytes * (holders[tag] > 1), minlength=len(files))
    return {digest: int(each) for digest, each in zip(files, shared, strict=True)}


def _divided(size: int, shared: int) -> SharedBytes:
    shared = min(shared, size)
    return SharedBytes(size - shared, shared)
