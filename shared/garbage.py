"""Files that nothing needs any more: neither a manifest, nor a recipe, nor somebody who has just
stored them."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable
from typing import Final

import msgspec

from shared.blobs import BlobStore, check_digest
from shared.errors import InvalidRequest
from shared.files import LAYOUTS, RECIPES
from shared.manifests import MANIFEST, MODELS
from shared.storage import Entry, Storage

_MENTION: Final = re.compile(rb"sha256:[0-9a-f]{64}")


class Collected(msgspec.Struct, frozen=True):
    """What was removed."""

    blobs: int
    """Files."""
    blob_bytes: int
    """What they and their parts took."""
    unfinished_uploads: int
    parts: int = 0
    """Parts that no file needs any more."""


def collect(storage: Storage, blobs: BlobStore, min_age_s: float) -> Collected:
    """Removes files that no manifest mentions and that are older than `min_age_s` seconds, then the
    parts that no file needs any more, layouts of what is gone, and uploads whose writer is. `blobs`
    are those of this storage."""
    with storage.lock(exclusive=True):
        used = _mentioned(storage, storage.find(MODELS, 2, MANIFEST))
        now = time.time()

        def kept(digest: str, entry: Entry) -> bool:
            return digest in used or entry.modified is None or now - entry.modified < min_age_s

        uploads = storage.sweep(min_age_s)
        files = parts = size = 0
        removed: set[str] = set()
        recipes = _by_digest(storage.find(RECIPES, 1))
        remaining = {digest for digest, entry in recipes.items() if kept(digest, entry)}
        needed, dropped = (
            _mentioned(storage, [e for digest, e in recipes.items() if (digest in remaining) is of])
            for of in (True, False)
        )
        for digest in recipes.keys() - remaining:
            storage.remove(recipes[digest].path)
            removed.add(digest)
            files += 1
            size += recipes[digest].size
        for digest, entry in blobs.entries().items():
            if digest in needed or kept(digest, entry):
                remaining.add(digest)
                continue
            blobs.remove(digest)
            removed.add(digest)
            size += entry.size
            if digest in dropped:
                parts += 1
            else:
                files += 1
        for digest, entry in _by_digest(storage.find(LAYOUTS, 1)).items():
            if digest not in remaining and (digest in removed or not kept(digest, entry)):
                storage.remove(entry.path)
        return Collected(files, size, uploads, parts)


def _mentioned(storage: Storage, entries: Iterable[Entry]) -> set[str]:
    """The digests in these files, taken from the raw text: a manifest of a newer Roost still keeps
    its file, and a recipe that cannot be read its parts."""
    texts = storage.read_many([entry.path for entry in entries])
    return {found.decode() for text in texts.values() for found in _MENTION.findall(text)}


def _by_digest(entries: Iterable[Entry]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        with contextlib.suppress(InvalidRequest):  # a file that somebody else put there
            found[check_digest(f"sha256:{entry.path.rpartition('/')[2]}")] = entry
    return found
