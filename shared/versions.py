"""Which versions of which models there are: one look at the folders, each time it is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from shared.errors import Internal, ModelNotFound, Unavailable
from shared.listing import Listing
from shared.manifests import MANIFEST, MODELS, decode_manifest, manifest_path, numbers, split_path
from shared.models import Manifest
from shared.names import check_name, check_version
from shared.storage import Storage

_RACES: Final = 1000
"""How often what was just found may be gone before we say so."""


class Versions:
    """Those of one storage. May be called from several threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._all = Listing(storage, lambda _: True)
        self._standing = Listing(storage, lambda manifest: manifest.min_copies > 0)

    def manifest(self, name: str, version: int | None = None) -> Manifest:
        """One version, None for the highest. Raises `ModelNotFound`; `Internal`, naming the
        file, when the manifest is broken."""
        check_name(name)
        for _ in range(_RACES):
            number = check_version(version) if version is not None else None
            if number is None:
                versions = self.numbers(name)
                if not versions:
                    raise ModelNotFound(f"model {name!r} is not registered")
                number = versions[-1]
            path = manifest_path(name, number)
            try:
                data = self._storage.read(path)
            except FileNotFoundError:
                if version is None:
                    continue  # removed between the two looks
                raise ModelNotFound(
                    f"model {name!r} has no version {number}"
                    if self.numbers(name)
                    else f"model {name!r} is not registered"
                ) from None
            return decode_manifest(path, data)
        raise Unavailable(f"the versions of {name!r} keep changing; try again")

    def numbers(self, name: str) -> list[int]:
        """Of one model, ascending; empty when it is not registered."""
        return numbers(self._storage.find(f"{MODELS}/{check_name(name)}", 1, MANIFEST))

    def names(self) -> Iterator[str]:
        """Every model with at least one version, sorted."""
        found = self._storage.find(MODELS, 2, MANIFEST)
        yield from sorted({known[0] for entry in found if (known := split_path(entry.path))})

    def owner(self, name: str) -> str | None:
        """Whose model this is; None when it is not registered."""
        versions = self.numbers(name)
        for number in reversed(versions):
            with contextlib.suppress(ModelNotFound, Internal):  # gone just now; broken
                return self.manifest(name, number).tenant
        return "" if versions else None

    def manifests(self) -> list[Manifest]:
        """Every version of every model, sorted by name and version, in one pass. A broken
        manifest is left out and logged once."""
        return self._all.look()

    def standing(self) -> list[Manifest]:
        """As `manifests`, of the versions that are to have copies at all times. It remembers
        next to nothing of the others."""
        return self._standing.look()
