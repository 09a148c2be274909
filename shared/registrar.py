"""How a stored file becomes a version, whoever else registers, removes or collects meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

import msgspec

from shared.errors import AlreadyExists, InvalidRequest, ModelNotFound, RoostError, Unavailable
from shared.files import ModelFiles
from shared.manifests import encode_manifest, manifest_path, new_manifest, same_manifest
from shared.models import Format, Manifest, ModelSpec
from shared.names import check_name, check_version
from shared.pt2 import check_model, choose
from shared.storage import Storage
from shared.tombstones import Tombstones
from shared.versions import Versions

_RACES: Final = 1000
"""How often the next version number may be snatched away before we say so."""
_MAX_CHECKED: Final = 100_000
"""Files of which it is remembered what they can be run as."""


class Registrar:
    """Registers versions in one storage. May be called from several threads."""

    def __init__(
        self,
        storage: Storage,
        files: ModelFiles,
        versions: Versions,
        tombstones: Tombstones,
        remove: Callable[[str, int], None],
    ) -> None:
        """`remove` takes one version back with all that hangs on it, or raises `ModelNotFound`."""
        self._storage = storage
        self._files = files
        self._versions = versions
        self._tombstones = tombstones
        self._remove = remove
        self._checked: dict[str, tuple[Format, ...]] = {}
        """What files can be run as, by digest, as far as this process has looked."""

    def register(
        self, name: str, version: int | None, spec: ModelSpec, digest: str, tenant: str | None
    ) -> Manifest:
        """See `Repository.register`."""
        check_name(name)
        owner = self._versions.owner(name)
        if owner is None:
            owner = tenant or ""
        elif tenant is not None and tenant != owner:
            raise taken(name)
        if version is not None:
            version = check_version(version)
        size, formats = self._check_file(digest)
        said = None if spec.format is msgspec.UNSET else spec.format
        spec = msgspec.structs.replace(spec, format=choose(formats, said))
        for _ in range(_RACES):
            number = version or self._next_version(name, spec, digest, owner)
            fresh = new_manifest(name, number, spec, digest, size, owner)
            try:
                self._create(fresh)
                self._check_alone(fresh)
                return fresh
            except FileExistsError:
                try:
                    present = self._versions.manifest(name, number)
                except ModelNotFound:
                    if version is not None and self._tombstones.forbid(fresh):
                        unused = self._unused(name, max(self._versions.numbers(name), default=0))
                        raise AlreadyExists(
                            f"version {number} of model {name!r} was removed; version numbers "
                            f"are not used again, push without a version or as {unused}"
                        ) from None
                    continue  # removed in this moment
                if same_manifest(present, fresh):
                    return present
                if version is not None:
                    raise AlreadyExists(
                        f"model {name!r} has a version {number} already, with another file or "
                        "specification; versions are immutable, so register a new one"
                    ) from None
            except ModelNotFound as error:
                raise _no_upload(digest) from error
        raise Unavailable(f"too many registrations of {name!r} at once; try again")

    def _create(self, manifest: Manifest) -> None:
        """Raises `FileExistsError` when the number is taken, be it by what was removed;
        `ModelNotFound` when the file is gone."""
        path = manifest_path(manifest.name, manifest.version)
        # The lock keeps garbage collection from taking the file in between.
        with self._storage.lock(exclusive=False):
            self._files.touch(manifest.digest)
            if self._tombstones.forbid(manifest):
                raise FileExistsError(path)
            self._storage.create(path, encode_manifest(manifest))
            # A bucket has no lock: another version may have gone since we looked, but then its
            # tombstone is there by now.
            if self._tombstones.forbid(manifest):
                with contextlib.suppress(FileNotFoundError):
                    self._storage.remove(path)
                raise FileExistsError(path)

    def _check_alone(self, fresh: Manifest) -> None:
        """Two tenants that registered a new name at the same moment both withdraw, rather than
        share it. Raises `AlreadyExists`."""
        others = [n for n in self._versions.numbers(fresh.name) if n != fresh.version]
        try:
            same = (
                not others or self._versions.manifest(fresh.name, others[0]).tenant == fresh.tenant
            )
        except RoostError:  # broken, or removed in this moment: then nobody has it
            same = True
        if not same:
            with contextlib.suppress(ModelNotFound):
                self._remove(fresh.name, fresh.version)
            raise taken(fresh.name)

    def _unused(self, name: str, newest: int) -> int:
        """The number above `newest`, as it was seen before, and all that were removed."""
        return max([newest, *self._tombstones.numbers(name)]) + 1

    def _next_version(self, name: str, spec: ModelSpec, digest: str, tenant: str) -> int:
        newest = max(self._versions.numbers(name), default=0)
        try:
            same = newest and same_manifest(
                self._versions.manifest(name, newest),
                new_manifest(name, newest, spec, digest, 0, tenant),
            )
        except RoostError:  # broken, or removed in this moment: no reason to refuse a new one
            same = False
        # From the same look: an equal version that came since must be met, not passed by.
        return newest if same else check_version(self._unused(name, newest))

    def _check_file(self, digest: str) -> tuple[int, tuple[Format, ...]]:
        """The file's size, and what it can be run as."""
        try:
            size = self._files.size(digest)
            formats = self._checked.get(digest)
            if formats is None:
                with self._files.open(digest) as file:
                    formats = check_model(file)
        except ModelNotFound as error:
            raise _no_upload(digest) from error
        if len(self._checked) >= _MAX_CHECKED:
            self._checked.clear()
        self._checked[digest] = formats
        return size, formats


def taken(name: str) -> AlreadyExists:
    """What is told to whoever wants a name that another tenant has."""
    return AlreadyExists(f"the name {name!r} is taken")


def _no_upload(digest: str) -> InvalidRequest:
    return InvalidRequest(f"the repository has no file {digest}: upload it first")
