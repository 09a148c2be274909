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

from collections.abc import Callable

from shared.aliases import Aliases
from shared.aliasfiles import AliasFolder
from shared.errors import Conflict, ModelNotFound
from shared.files import ModelFiles
from shared.garbage import Collected, collect
from shared.keys import Keys
from shared.manifests import manifest_path
from shared.models import Footprint, Manifest, ModelSpec
from shared.names import ModelId, check_name, check_version, model_id
from shared.profiles import Profiles
from shared.quarantine import Death, Held, Quarantine
from shared.registrar import Registrar
from shared.sharing import SharedBytes, Sharing
from shared.storage import open_storage
from shared.tenants import Tenants
from shared.tombstones import Tombstones
from shared.unloaded import Unloaded
from shared.versions import Versions


class Repository:
    """The parts, and what concerns several of them. `url` is a path or an fsspec URL, e.g.
    `s3://bucket/roost`."""

    def __init__(self, url: str) -> None:
        self._storage = open_storage(url)
        self.files = ModelFiles(self._storage)
        self.versions = Versions(self._storage)
        self.profiles = Profiles(self._storage)
        self.tenants = Tenants(self._storage)
        self.keys = Keys(self._storage)
        self._sharing = Sharing(self.files.blocks)
        self._tombstones = Tombstones(self._storage)
        self._unloaded = Unloaded(self._storage)
        self._aliases = AliasFolder(self._storage)
        self._quarantine = Quarantine(self._storage)
        self._registrar = Registrar(
            self._storage, self.files, self.versions, self._tombstones, self.remove
        )

    def __repr__(self) -> str:
        return f"Repository({self._storage!r})"

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
        return self._registrar.register(name, version, spec, digest, tenant)

    def remove(self, name: str, version: int | None = None) -> None:
        """Removes one version, None for all of them, with their profiles. Files stay until
        `collect_garbage`, the numbers stay taken for ever: only what was removed can be
        registered under one again. The last version takes the model's aliases along. Raises
        `ModelNotFound`, and `Conflict` for one version to which an alias leads."""
        check_name(name)
        candidates = self.versions.numbers(name) if version is None else [check_version(version)]
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
                self.profiles.forget(name, number)
                self._quarantine.forget(model_id(name, number))
        if not removed:
            there = version is not None and self.versions.numbers(name)
            what = f"has no version {version}" if there else "is not registered"
            raise ModelNotFound(f"model {name!r} {what}")
        if not self.versions.numbers(name):
            self._unloaded.remove(name)  # whoever registers the name anew means to use it
            self._aliases.clear(name)

    def estimate(self, manifest: Manifest) -> Footprint | None:
        """What a model takes of a device, before any worker has said so: from the layout beside its
        file, no file is read. None where there is none, or weights cannot be told apart."""
        contents = self.files.contents(manifest.digest)
        if contents is None or contents.obstacle is not None or manifest.stateful:
            return None
        return Footprint(contents.weights_bytes, measured=False, shares=contents.shares)

    def sharing(self) -> dict[ModelId, SharedBytes]:
        """How many bytes of each version are its own, and how many another one has too."""
        return self._sharing.count(self.versions.manifests())

    # --- unloaded models ----------------------------------------------------------------

    def unload(self, name: str) -> None:
        """The model, all its versions, is not to be asked until `load`; durable on return, and
        idempotent. Raises `ModelNotFound`."""
        self.versions.manifest(name)  # raises when there is none
        self._unloaded.put(name)

    def load(self, name: str) -> bool:
        """Takes `unload` back. Whether the model was unloaded; raises `ModelNotFound`."""
        self.versions.manifest(name)
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
        self.versions.manifest(name, version)
        versions = self.versions.numbers(name) if version is None else [check_version(version)]
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
        self.versions.manifest(name)  # raises when there is none
        return self._aliases.edit(
            name, edit, lambda number: self.versions.manifest(name, number), revision
        )

    # --- garbage ------------------------------------------------------------------------

    def collect_garbage(self, min_age_s: float = 3600.0) -> Collected:
        """Removes files that no manifest mentions, parts that no file needs, and uploads whose
        writer is gone, when they are older than `min_age_s` seconds.

        A file is stored before its manifest, so `min_age_s` must exceed the time between the
        two. On a directory nothing can be registered meanwhile; a bucket has no lock, so there
        it should run while nobody registers.
        """
        return collect(self._storage, self.files.blobs, min_age_s)
