"""What stays of a removed version, so that its number never means another file.

`models/<name>/<version>/removed.json` is written once, before the manifest goes for the first
time, and never goes itself. Beside a manifest it says nothing: the version was revived, or its
removal was cut short.
"""

from __future__ import annotations

import contextlib
import time
from typing import Final

import msgspec

from shared.errors import Internal, RoostError
from shared.manifests import (
    MODELS,
    decode_manifest,
    manifest_path,
    numbers,
    same_manifest,
)
from shared.models import Manifest
from shared.storage import Storage

REMOVED: Final = "removed.json"


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a tombstone."""

    removed_at: float
    """Unix time of the first removal."""
    manifest: Manifest | None = None
    """Only this may come back under the number; None when it could not be read, so nothing."""


_decode = msgspec.json.Decoder(Removed).decode


class Tombstones:
    """Those of one storage. Its lock is the caller's business."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def numbers(self, name: str) -> list[int]:
        """The versions that were ever removed, revived ones too; ascending."""
        return numbers(self._storage.find(f"{MODELS}/{name}", 1, REMOVED))

    def put(self, name: str, version: int) -> None:
        """For the version that is there now; `FileNotFoundError` when there is none."""
        path = manifest_path(name, version)
        try:
            manifest = decode_manifest(path, self._storage.read(path))
        except Internal:  # broken, which is no reason to keep it
            manifest = None
        removed = Removed(removed_at=time.time(), manifest=manifest)
        data = msgspec.json.format(msgspec.json.encode(removed), indent=2)
        with contextlib.suppress(FileExistsError):
            self._storage.create(_path(name, version), data)

    def forbid(self, manifest: Manifest) -> bool:
        """Whether the number was used for something else than this."""
        try:
            data = self._storage.read(_path(manifest.name, manifest.version))
        except FileNotFoundError:
            return False
        try:
            removed = _decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError, RoostError):
            return True  # it still says that the number was used
        return removed.manifest is None or not same_manifest(removed.manifest, manifest)


def _path(name: str, version: int) -> str:
    return f"{MODELS}/{name}/{version}/{REMOVED}"
