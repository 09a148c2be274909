"""The repository's files: whole, or as recipes over parts that several files have in common.

    blobs/sha256/<2 hex>/<64 hex>    files and parts, by content
    recipes/sha256/<2 hex>/<64 hex>  how a file is put together, by the file's content
    layouts/sha256/<2 hex>/<64 hex>  what is inside of a file, likewise

A TorchScript file is cut up when it arrives, before it has a name: what was given a name never
changes its place, so a path that was told stays good until the file is garbage. Files of any other
kind, those without large tensors, and those from before there were recipes are whole. A file is
there when it is there whole or as a recipe; a recipe appears after its parts and goes before
them. See docs/adr/0007.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from shared.blobs import BlobStore, BlobWriter, check_digest
from shared.contents import Contents, open_contents, open_layout, seal
from shared.errors import Internal, InvalidRequest, ModelNotFound, RoostError
from shared.layout import Block, Extent, Layout
from shared.layout.torchscript import read_layout
from shared.recipes import (
    Assembled,
    Cut,
    Recipe,
    chunks,
    cut,
    decode_recipe,
    encode_recipe,
    extents,
    read_extents,
    write_recipe,
)
from shared.storage import Entry, Stage, Storage, open_storage, translated

RECIPES: Final = "recipes/sha256"
LAYOUTS: Final = "layouts/sha256"
_REMOTE_THREADS: Final = 8
"""Parts that travel at once: a bucket answers slowly, but to many."""

T = TypeVar("T")


class ModelFiles:
    """Those of one storage. See the module's text. May be called from several threads.

    `cache_dir` is a folder on this machine (same layout, not cleaned up here) for copies of what
    is in another place, or in pieces; it is made when it is needed.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.blobs = BlobStore(storage)
        """Those that are whole, and parts of the others."""
        self._local = storage.local_path(RECIPES) is not None
        self._caches: dict[str, BlobStore] = {}

    # --- writing ------------------------------------------------------------------------

    def writer(self, max_bytes: int | None = None) -> BlobWriter:
        """For uploads that come in pieces: `with … as w: w.write(piece); w.commit(expect)`."""
        return BlobWriter(self._storage.stage(), self._settle, max_bytes)

    def put(
        self, pieces: Iterable[bytes], expect: str | None = None, max_bytes: int | None = None
    ) -> tuple[str, int]:
        """Stores a file; returns its digest and size. The same content is stored once.

        Raises `InvalidRequest` when the digest is not the one to `expect`, `TooLarge`.
        """
        with self.writer(max_bytes) as writer:
            for piece in pieces:
                writer.write(piece)
            return writer.commit(expect)

    def _settle(self, stage: Stage, digest: str, size: int) -> None:
        """Keeps a written stage under its digest, or drops it when the same content is there."""
        with self._storage.lock(exclusive=False):
            if self._present(digest, size):
                stage.discard()
                return
        layout, cuts = _take_apart(stage, size)
        # The lock: parts that are found here must not be collected before the recipe is there.
        with self._storage.lock(exclusive=False):
            if layout is not None:
                self._storage.replace(_layout_path(digest), seal(layout))
            if cuts is None:
                self.blobs.publish(stage, digest, size)
            else:
                recipe = self._keep_parts(stage, cuts)
                self._storage.replace(_recipe_path(digest), encode_recipe(recipe))
                stage.discard()

    def _present(self, digest: str, size: int) -> bool:
        """Whether all of the file is there; if so it looks new from now on."""
        if self.blobs.present(digest, size):
            return True
        with contextlib.suppress(FileNotFoundError, Internal):  # Internal: it is written anew
            recipe = self._recipe(digest)
            if recipe is not None and all(
                self.blobs.present(part, nbytes) for part, nbytes in recipe.parts.items()
            ):
                self._storage.touch(_recipe_path(digest))
                return True
        return False

    def _keep_parts(self, stage: Stage, cuts: Sequence[Cut]) -> Recipe:
        tensors = {each.digest: each for each in cuts if each.digest is not None}

        def keep(digest: str) -> None:
            each = tensors[digest]
            if not self._sound(digest, each.nbytes):
                self._copy(stage, (each,), digest)

        self._for_each(keep, tensors)
        return write_recipe(cuts, self._copy(stage, [c for c in cuts if c.digest is None]))

    def _sound(self, digest: str, nbytes: int) -> bool:
        """Whether the part is there. As others will build on it, it is looked into once, if that
        costs no network; a damaged one is to be replaced."""
        if not self.blobs.present(digest, nbytes):
            return False
        try:
            self.blobs.verified_path(digest)
        except Internal:
            return False
        return True

    def _copy(self, stage: Stage, cuts: Sequence[Cut], digest: str | None = None) -> str:
        """Keeps these cuts of the file as one part. Returns its digest."""
        target = self._storage.stage()
        try:
            content = hashlib.sha256()
            with stage.reopen() as file:
                for chunk in chunks(file, cuts):
                    target.write(chunk)
                    if digest is None:
                        content.update(chunk)
            digest = digest or f"sha256:{content.hexdigest()}"
            self.blobs.publish(target, digest, sum(each.nbytes for each in cuts))
            return digest
        finally:
            target.discard()

    # --- reading ------------------------------------------------------------------------

    def has(self, digest: str) -> bool:
        return self.blobs.has(digest) or self._recipe_entry(digest) is not None

    def size(self, digest: str) -> int:
        """Bytes; raises `ModelNotFound` when there is no such file."""
        if self.blobs.has(digest):
            return self.blobs.size(digest)
        return self._need(digest).size

    def open(self, digest: str) -> BinaryIO:
        """For reading, seekable; nothing is verified."""
        if self.blobs.has(digest):
            return self.blobs.open(digest)
        return io.BufferedReader(Assembled(self._need(digest).pieces, self.blobs.open))

    def touch(self, digest: str) -> None:
        """Keeps the file from the next garbage collection; `ModelNotFound` when it is gone."""
        try:
            self.blobs.touch(digest)
        except ModelNotFound:
            try:
                self._storage.touch(_recipe_path(digest))
            except FileNotFoundError:
                raise _missing(digest) from None

    def path(self, digest: str, cache_dir: str) -> str:
        """The whole file on this machine, verified: the repository's own when it is a directory
        that has it in one piece, else a copy in the cache.

        Hashed once per process, its size checked each time. Raises `ModelNotFound` when the
        repository has no such file, `Internal` when it is damaged.
        """
        path = self.blobs.verified_path(digest)
        if path is not None:
            return path
        if not self.has(digest):
            raise _missing(digest)
        return self._cache(cache_dir).fetch(digest, self)

    def extents(self, digest: str, cache_dir: str) -> tuple[Extent, ...]:
        """Where the file lies on this machine, verified like `path`: as it is in the repository
        when that is a directory, else in the cache, to which is copied what other files have not
        brought there already. Raises what `path` raises."""
        path = self.blobs.verified_path(digest)
        if path is None:
            recipe = self._recipe(digest)
            if recipe is not None:
                return extents(recipe, self._fetch_parts(digest, recipe, cache_dir))
            if not self.blobs.has(digest):
                raise _missing(digest)
            path = self._cache(cache_dir).fetch(digest, self.blobs)
        return (Extent(path, 0, Path(path).stat().st_size),)

    def _fetch_parts(self, digest: str, recipe: Recipe, cache_dir: str) -> dict[str, str]:
        def fetch(part: str) -> str:
            if not self._local:
                return self._cache(cache_dir).fetch(part, self.blobs)
            path = self.blobs.verified_path(part)
            if path is None:
                if self._recipe_entry(digest) is None:
                    raise _missing(digest)  # collected in this moment
                raise Internal(f"the file {digest} is damaged: its part {part} is missing")
            return path

        return dict(zip(recipe.parts, self._for_each(fetch, recipe.parts), strict=True))

    def layout(self, digest: str, cache_dir: str) -> Layout | None:
        """What is inside a file; None when it is not TorchScript. It is kept beside the file since
        that was stored; where it is missing or of another version it is made again, which
        reads the file. Raises what `path` raises."""
        path = _layout_path(digest)
        with contextlib.suppress(FileNotFoundError):
            kept = open_layout(self._storage.read(path))
            if kept is not None:
                return kept
        try:
            with translated(), read_extents(self.extents(digest, cache_dir)) as file:
                layout = read_layout(file)
        except InvalidRequest:
            return None
        except FileNotFoundError:  # collected in this moment
            raise _missing(digest) from None
        # Who may only read the repository makes it again the next time.
        with contextlib.suppress(RoostError), self._storage.lock(exclusive=False):
            if self.has(digest):
                self._storage.replace(path, seal(layout))
        return layout

    def contents(self, digest: str) -> Contents | None:
        """Of the layout, if one is kept: no file is read for it."""
        try:
            return open_contents(self._storage.read(_layout_path(digest)))
        except FileNotFoundError:
            return None

    def blocks(self, digests: Iterable[str]) -> dict[str, tuple[Block, ...]]:
        """Of the layouts that are kept; the others are left out."""
        paths = {_layout_path(digest): digest for digest in digests}
        found: dict[str, tuple[Block, ...]] = {}
        for path, data in self._storage.read_many(paths).items():
            contents = open_contents(data)
            if contents is not None:
                found[paths[path]] = contents.blocks
        return found

    def _cache(self, folder: str) -> BlobStore:
        cache = self._caches.get(folder)
        if cache is None:
            storage = open_storage(folder, durable=False)
            storage.sweep(min_age_s=60.0)
            cache = self._caches.setdefault(folder, BlobStore(storage))
        return cache

    def _recipe_entry(self, digest: str) -> Entry | None:
        try:
            return self._storage.entry(_recipe_path(digest))
        except FileNotFoundError:
            return None

    def _recipe(self, digest: str) -> Recipe | None:
        path = _recipe_path(digest)
        try:
            return decode_recipe(path, self._storage.read(path))
        except FileNotFoundError:
            return None

    def _need(self, digest: str) -> Recipe:
        recipe = self._recipe(digest)
        if recipe is None:
            raise _missing(digest)
        return recipe

    def _for_each(self, act: Callable[[str], T], names: Iterable[str]) -> list[T]:
        if self._local:
            return [act(name) for name in names]
        with ThreadPoolExecutor(_REMOTE_THREADS, "roost-parts") as pool:
            return list(pool.map(act, names))


def _take_apart(stage: Stage, size: int) -> tuple[Layout | None, list[Cut] | None]:
    with stage.reopen() as file:
        try:
            layout = read_layout(file)
        except InvalidRequest:
            return None, None
    return layout, cut(layout.blocks, size)


def _recipe_path(digest: str) -> str:
    return _path(RECIPES, digest)


def _layout_path(digest: str) -> str:
    return _path(LAYOUTS, digest)


def _path(folder: str, digest: str) -> str:
    hexadecimal = check_digest(digest).removeprefix("sha256:")
    return f"{folder}/{hexadecimal[:2]}/{hexadecimal}"


def _missing(digest: str) -> ModelNotFound:
    return ModelNotFound(f"the repository has no file {digest}")
