"""The registry: every model version with its file, and what was measured of it.

Layout below the root, which is a directory or any URL that fsspec can open:

    blobs/, recipes/, layouts/                          the files (shared/files.py)
    models/<name>/<version>/manifest.json               one immutable version
    models/<name>/<version>/profiles/<device kind>.json what a worker measured
    models/<name>/<version>/removed.json                the number was used, and for what
    unloaded/<name>.json                                registered, but not to be asked now
    aliases/<name>@<revision>.json                      other names of its versions
    quarantine/<name>@<version>@…                       engines that ended of it
    tenants/<name>.json                                 what a tenant may take
    keys/<id>.json                                      API keys, without their secrets
    jobs/                                               of gateways (services/gateway/jobs/files.py)
    tmp/                                                unfinished uploads

A version exists when its manifest does, and a manifest appears in one step, after its file.
So there is no index to repair: the folders are the truth, and copying them is a backup.
A number never means two files, since a worker may keep a removed one in its memory: a version
that goes leaves a tombstone, `removed.json`, and only what was removed may come back.
Everything here is synchronous and may be called from several threads.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec
import structlog

from shared.aliases import Aliases
from shared.aliasfiles import AliasFolder
from shared.blobs import BlobStore, BlobWriter, check_digest
from shared.errors import (
    AlreadyExists,
    Conflict,
    Internal,
    InvalidRequest,
    ModelNotFound,
    RoostError,
    Unavailable,
)
from shared.files import Collected, ModelFiles
from shared.keys import Keys
from shared.layout import Extent, Layout
from shared.listing import Listing
from shared.manifests import (
    MANIFEST,
    MODELS,
    decode_manifest,
    encode_manifest,
    manifest_path,
    new_manifest,
    numbers,
    profile_path,
    profiles_path,
    same_manifest,
    split_path,
)
from shared.models import Footprint, Format, Manifest, ModelSpec, Profile
from shared.names import ModelId, check_name, check_version, model_id, split_model_id
from shared.pt2 import check_model, choose
from shared.quarantine import Death, Held, Quarantine
from shared.sharing import SharedBytes, Sharing
from shared.storage import open_storage
from shared.tenants import Tenants
from shared.tombstones import Tombstones
from shared.triton import scan
from shared.unloaded import Unloaded

_RACES: Final = 1000
"""How often the next version number may be snatched away before we say so."""
_MENTION: Final = re.compile(rb"sha256:[0-9a-f]{64}")
_READ_BYTES: Final = 1 << 20

_log = structlog.get_logger(__name__)
_decode_profile = msgspec.json.Decoder(Profile).decode


class Repository:
    """See the module's text. `url` is a path or an fsspec URL, e.g. `s3://bucket/roost`."""

    def __init__(self, url: str) -> None:
        self._storage = open_storage(url)
        self._files = ModelFiles(self._storage)
        self._sharing = Sharing(self._files.blocks)
        self._tombstones = Tombstones(self._storage)
        self._unloaded = Unloaded(self._storage)
        self._aliases = AliasFolder(self._storage)
        self._quarantine = Quarantine(self._storage)
        self.tenants = Tenants(self._storage)
        self.keys = Keys(self._storage)
        self._caches: dict[str, BlobStore] = {}
        self._checked: dict[str, tuple[Format, ...]] = {}
        """What files can be run as, by digest, as far as this process has looked."""
        self._all = Listing(self._storage, lambda _: True)
        self._standing = Listing(self._storage, lambda manifest: manifest.min_copies > 0)
        """Stamp and manifest by path, for listings; None for a broken one."""

    def __repr__(self) -> str:
        return f"Repository({self._storage!r})"

    # --- files --------------------------------------------------------------------------

    def put_blob(
        self,
        chunks: Iterable[bytes],
        expect_digest: str | None = None,
        max_bytes: int | None = None,
    ) -> tuple[str, int]:
        """Stores a file; returns its digest and size. The same content is stored once.

        Raises `InvalidRequest` when the digest is not the expected one, `TooLarge`.
        """
        return self._files.put(chunks, expect_digest, max_bytes)

    def open_blob_writer(self, max_bytes: int | None = None) -> BlobWriter:
        """For uploads that come in pieces: `with … as w: w.write(piece); w.commit(expect)`."""
        return self._files.writer(max_bytes)

    def has_blob(self, digest: str) -> bool:
        return self._files.has(digest)

    def blob_size(self, digest: str) -> int:
        """Bytes; raises `ModelNotFound` when there is no such file."""
        return self._files.size(digest)

    def local_path(self, digest: str, cache_dir: str) -> str:
        """A whole, verified file on this machine: the repository's own when it is a directory
        that has it in one piece, else a copy below `cache_dir` (same layout, not cleaned up here).

        Hashed once per process, its size checked each time. Raises `ModelNotFound` when the
        repository has no such file, `Internal` when it is damaged.
        """
        return self._files.path(check_digest(digest), lambda: self._cache(cache_dir))

    def local_extents(self, digest: str, cache_dir: str) -> tuple[Extent, ...]:
        """Where the file lies on this machine, verified like `local_path`: as it is in the
        repository when that is a directory, else in `cache_dir`, to which is copied what other
        files have not brought there already. Raises what `local_path` raises."""
        return self._files.extents(check_digest(digest), lambda: self._cache(cache_dir))

    def layout(self, digest: str, cache_dir: str) -> Layout | None:
        """What is inside a file; None when it is not TorchScript. It is kept beside the file since
        that was stored; where it is missing or of another version it is made again, which
        reads the file. Raises what `local_path` raises."""
        return self._files.layout(check_digest(digest), lambda: self._cache(cache_dir))

    def estimate(self, manifest: Manifest) -> Footprint | None:
        """What a model takes of a device, before any worker has said so: from the layout beside its
        file, no file is read. None where there is none, or weights cannot be told apart."""
        contents = self._files.contents(check_digest(manifest.digest))
        if contents is None or contents.obstacle is not None or manifest.stateful:
            return None
        return Footprint(contents.weights_bytes, measured=False, shares=contents.shares)

    def sharing(self) -> dict[ModelId, SharedBytes]:
        """How many bytes of each version are its own, and how many another one has too."""
        return self._sharing.count(self.manifests())

    def _cache(self, cache_dir: str) -> BlobStore:
        cache = self._caches.get(cache_dir)
        if cache is None:
            storage = open_storage(cache_dir, durable=False)
            storage.sweep(min_age_s=60.0)
            cache = self._caches.setdefault(cache_dir, BlobStore(storage))
        return cache

    # --- versions -----------------------------------------------------------------------

    def register(
        self,
        name: str,
        version: int | None,
        spec: ModelSpec,
        digest: str,
        tenant: str | None = None,
    ) -> Manifest:
        """Makes a stored file a version of a model; durable on return.

        It is `tenant`'s (empty: nobody's in particular); None: of whoever has the name, and
        nobody's if it is new. All versions of a name are one tenant's.

        `version=None` takes the number above all that were ever used, unless the newest version
        is just this already. Registering the same again returns the manifest that is there; a
        removed version comes back as it was. A spec that names no format gets the file's. Raises
        `AlreadyExists` when the version holds, or held, something else, or the name is another
        tenant's; `InvalidRequest` when the file is not there or not what the spec says it is.
        """
        check_name(name)
        owner = self.owner(name)
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
                    present = self.manifest(name, number)
                except ModelNotFound:
                    if version is not None and self._tombstones.forbid(fresh):
                        unused = self._unused(name, max(self.versions(name), default=0))
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
        # The lock keeps collect_garbage from taking the file in between.
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
        others = [number for number in self.versions(fresh.name) if number != fresh.version]
        try:
            same = not others or self.manifest(fresh.name, others[0]).tenant == fresh.tenant
        except RoostError:  # broken, or removed in this moment: then nobody has it
            same = True
        if not same:
            with contextlib.suppress(ModelNotFound):
                self.remove(fresh.name, fresh.version)
            raise taken(fresh.name)

    def owner(self, name: str) -> str | None:
        """Whose model this is; None when it is not registered."""
        versions = self.versions(name)
        for number in reversed(versions):
            with contextlib.suppress(ModelNotFound, Internal):  # gone just now; broken
                return self.manifest(name, number).tenant
        return "" if versions else None

    def _unused(self, name: str, newest: int) -> int:
        """The number above `newest`, as it was seen before, and all that were removed."""
        return max([newest, *self._tombstones.numbers(name)]) + 1

    def _next_version(self, name: str, spec: ModelSpec, digest: str, tenant: str) -> int:
        newest = max(self.versions(name), default=0)
        try:
            same = newest and same_manifest(
                self.manifest(name, newest), new_manifest(name, newest, spec, digest, 0, tenant)
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
        if len(self._checked) >= 100_000:
            self._checked.clear()
        self._checked[digest] = formats
        return size, formats

    def manifest(self, name: str, version: int | None = None) -> Manifest:
        """One version, None for the highest. Raises `ModelNotFound`; `Internal`, naming the
        file, when the manifest is broken."""
        check_name(name)
        for _ in range(_RACES):
            number = check_version(version) if version is not None else None
            if number is None:
                versions = self.versions(name)
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
                    if self.versions(name)
                    else f"model {name!r} is not registered"
                ) from None
            return decode_manifest(path, data)
        raise Unavailable(f"the versions of {name!r} keep changing; try again")

    def versions(self, name: str) -> list[int]:
        """Ascending; empty when the model is not registered."""
        return numbers(self._storage.find(f"{MODELS}/{check_name(name)}", 1, MANIFEST))

    def names(self) -> Iterator[str]:
        """Every model with at least one version, sorted."""
        found = self._storage.find(MODELS, 2, MANIFEST)
        yield from sorted({known[0] for entry in found if (known := split_path(entry.path))})

    def manifests(self) -> list[Manifest]:
        """Every version of every model, sorted by name and version, in one pass. A broken
        manifest is left out and logged once."""
        return self._all.look()

    def standing(self) -> list[Manifest]:
        """As `manifests`, of the versions that are to have copies at all times. It remembers
        next to nothing of the others."""
        return self._standing.look()

    def remove(self, name: str, version: int | None = None) -> None:
        """Removes one version, None for all of them, with their profiles. Files stay until
        `collect_garbage`, the numbers stay taken for ever: only what was removed can be
        registered under one again. The last version takes the model's aliases along. Raises
        `ModelNotFound`, and `Conflict` for one version to which an alias leads."""
        check_name(name)
        candidates = self.versions(name) if version is None else [check_version(version)]
        removed = 0
        with self._storage.lock(exclusive=True):
            if version is not None and (users := self._aliases.read(name).users(version)):
                raise Conflict(
                    f"version {version} of model {name!r} cannot be removed: the alias "
                    f"{', '.join(map(repr, users))} leads to it, or is about to"
                )
            for number in candidates:
                try:
                    # First: who dies in between leaves the version, never a free number.
                    self._tombstones.put(name, number)
                    self._storage.remove(manifest_path(name, number))
                    removed += 1
                except FileNotFoundError:
                    continue
                self._storage.remove_tree(profiles_path(name, number))
                self._quarantine.forget(model_id(name, number))
        if not removed:
            there = version is not None and self.versions(name)
            what = f"has no version {version}" if there else "is not registered"
            raise ModelNotFound(f"model {name!r} {what}")
        if not self.versions(name):
            self._unloaded.remove(name)  # whoever registers the name anew means to use it
            self._aliases.clear(name)

    # --- unloaded models ----------------------------------------------------------------

    def unload(self, name: str) -> None:
        """The model, all its versions, is not to be asked until `load`; durable on return, and
        idempotent. Raises `ModelNotFound`."""
        self.manifest(name)  # raises when there is none
        self._unloaded.put(name)

    def load(self, name: str) -> bool:
        """Takes `unload` back. Whether the model was unloaded; raises `ModelNotFound`."""
        self.manifest(name)
        return self._unloaded.remove(name)

    def unloaded(self) -> frozenset[str]:
        """The names of the models that are unloaded."""
        return self._unloaded.names()

    # --- what kills engines -------------------------------------------------------------

    def add_death(self, model: ModelId, death: Death) -> None:
        """Durable on return: engines ended of this version. Raises `Unavailable`."""
        self._quarantine.add(model, death)

    def quarantined(self) -> dict[ModelId, Held]:
        """The versions that are kept from all engines, and why."""
        return self._quarantine.held()

    def release(self, name: str, version: int | None = None) -> list[ModelId]:
        """Takes one version, or all of a model, out of quarantine; returns which were in it.
        Raises `ModelNotFound` when there is none."""
        self.manifest(name, version)
        versions = self.versions(name) if version is None else [check_version(version)]
        ids = [model_id(name, number) for number in versions]
        return [model for model in ids if self._quarantine.forget(model)]

    # --- aliases ------------------------------------------------------------------------

    def aliases(self) -> dict[str, Aliases]:
        """By model, of all that ever had some."""
        return self._aliases.read_all()

    def edit_aliases(
        self, name: str, edit: Callable[[Aliases], Aliases], revision: int | None = None
    ) -> Aliases:
        """What `edit` makes of the model's aliases is what they are from now on; durable on return.

        It is called again when somebody else was faster. Raises `ModelNotFound`, also for a
        version to which they would lead; `Conflict` when they are not at `revision` any more,
        None for whatever they are at; and what `edit` raises.
        """
        self.manifest(name)  # raises when there is none
        return self._aliases.edit(name, edit, lambda number: self.manifest(name, number), revision)

    def collect_garbage(self, min_age_s: float = 3600.0) -> Collected:
        """Removes files that no manifest mentions, parts that no file needs, and uploads whose
        writer is gone, when they are older than `min_age_s` seconds.

        A file is stored before its manifest, so `min_age_s` must exceed the time between the
        two. On a directory nothing can be registered meanwhile; a bucket has no lock, so there
        it should run while nobody registers.
        """
        with self._storage.lock(exclusive=True):
            paths = [entry.path for entry in self._storage.find(MODELS, 2, MANIFEST)]
            # Taken from the raw text: a manifest of a newer Roost still keeps its file.
            used = {
                mention.decode()
                for data in self._storage.read_many(paths).values()
                for mention in _MENTION.findall(data)
            }
            collected = self._files.collect(used, min_age_s)
            self._checked.clear()
        return collected

    # --- measurements -------------------------------------------------------------------

    def profile(self, model: ModelId, device_kind: str) -> Profile | None:
        """What was measured of a model on this kind of device; None when nothing was, or when
        it cannot be read (it can be measured again)."""
        path = profile_path(model, device_kind)
        try:
            profile = _decode_profile(self._storage.read(path))
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            _log.warning("profile_skipped", path=path, error=str(error))
            return None
        return profile if profile.device_kind == device_kind else None

    def put_profile(self, model: ModelId, profile: Profile) -> None:
        """Keeps a measurement in place of the last one. Raises `ModelNotFound`."""
        path = profile_path(model, profile.device_kind)
        with self._storage.lock(exclusive=False):
            try:
                self._storage.entry(manifest_path(*split_model_id(model)))
            except FileNotFoundError:
                raise ModelNotFound(f"model {model!r} is not registered") from None
            self._storage.replace(path, msgspec.json.encode(profile))

    # --- import -------------------------------------------------------------------------

    def import_triton(self, directory: str) -> tuple[list[Manifest], dict[str, RoostError]]:
        """Registers every model version of a Triton model repository (a path or fsspec URL).

        Returns the manifests, and the errors by `<model>` or `<model>/<version>`: a model that
        cannot be imported does not keep the others out. Importing again changes nothing.
        """
        manifests: list[Manifest] = []
        errors: dict[str, RoostError] = {}
        for found in scan(directory):
            if isinstance(found.content, RoostError):
                errors[found.label] = found.content
                continue
            try:
                with found.content.open() as file:
                    digest, _ = self.put_blob(iter(lambda: file.read(_READ_BYTES), b""))
                version, spec = found.content.version, found.content.spec
                manifests.append(self.register(found.content.name, version, spec, digest))
            except RoostError as error:
                errors[found.label] = error
            except OSError as error:
                errors[found.label] = Unavailable(f"cannot be read: {error.strerror or error}")
        return manifests, errors


def taken(name: str) -> AlreadyExists:
    """What is told to whoever wants a name that another tenant has."""
    return AlreadyExists(f"the name {name!r} is taken")


def _no_upload(digest: str) -> InvalidRequest:
    return InvalidRequest(f"the repository has no file {digest}: upload it first")
