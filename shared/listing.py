"""Manifests of a whole registry, looked through again and again: only what has changed is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final

import structlog

from shared.errors import Internal
from shared.manifests import MANIFEST, MODELS, decode_manifest
from shared.models import Manifest
from shared.storage import Storage

_log = structlog.get_logger(__name__)

_AT_ONCE: Final = 256
"""Files whose content is in memory at one time."""


class Listing:
    """Those of one storage that are `wanted`. Of the others nothing is kept but a number each."""

    def __init__(self, storage: Storage, wanted: Callable[[Manifest], bool]) -> None:
        self._storage = storage
        self._wanted = wanted
        self._seen: dict[str, int] = {}
        """By path, what its content was read at (`Entry.stamp`, hashed)."""
        self._found: dict[str, Manifest] = {}

    def look(self) -> list[Manifest]:
        """Sorted by name and version. A broken manifest is left out, and logged once. Raises
        `Unavailable`."""
        seen = {e.path: hash(e.stamp) for e in self._storage.find(MODELS, 2, MANIFEST)}
        found = {
            path: manifest
            for path, manifest in self._found.items()
            if seen.get(path) == self._seen.get(path)
        }
        unread = [path for path, stamp in seen.items() if self._seen.get(path) != stamp]
        for some in _pieces(unread):
            for path, data in self._storage.read_many(some).items():
                try:
                    manifest = decode_manifest(path, data)
                except Internal as error:
                    _log.warning("manifest_skipped", path=path, error=str(error))
                    continue
                if self._wanted(manifest):
                    found[path] = manifest
        self._seen, self._found = seen, found
        return sorted(found.values(), key=lambda manifest: (manifest.name, manifest.version))


def _pieces(paths: Iterable[str]) -> Iterator[list[str]]:
    left = iter(paths)
    while some := list(islice(left, _AT_ONCE)):
        yield some
