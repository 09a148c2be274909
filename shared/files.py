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
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import msgspec

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
from shared.storage import Entry, Stage, Storage, translated

RECIPES: Final = "recipes/sha256"
LAYOUTS: Final = "layouts/sha256"
_MENTION: Final = re.compile(rb"sha256:[0-9a-f]{64}")
_REMOTE_THREADS: Final = 8
"""Parts that travel at once: a bucket answers slowly, but to many."""

T = TypeVar("T")


class Collected(msgspec.Struct, frozen=True):
    """What `collect_garbage` removed."""

    blobs: int
    """Files."""
    blob_bytes: int
    """What they and their parts took."""
    unfinished_uploads: int
    parts: int = 0
    """Parts that no file needs any more."""


class ModelFiles:
    """Those of one storage. See the module's text."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._blobs = BlobStore(storage)
        self._local = storage.local_path(RECIPES) is not None

    # --- writing ------------------------------------------------------------------------

    def writer(self, max_bytes: int | None = None) -> BlobWriter:
        return BlobWriter(self._storage.stage(), self._settle, max_bytes)

    def put(
        self, pieces: Iterable[bytes], expect: str | None = None, max_bytes: int | None = None
    ) -> tuple[str, int]:
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
                self._blobs.publish(stage, digest, size)
            else:
                recipe = self._keep_parts(stage, cuts)
                self._storage.replace(_recipe_path(digest), encode_recipe(recipe))
                stage.discard()

    def _present(self, digest: str, size: int) -> bool:
        """Whether all of the file is there; if so it looks new from now on."""
        if self._blobs.present(digest, size):
            return True
        with contextlib.suppress(FileNotFoundError, Internal):  # Internal: it is written anew
            recipe = self._recipe(digest)
            if recipe is not None and all(
                self._blobs.present(part, nbytes) for part, nbytes in recipe.parts.items()
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
        if not self._blobs.present(digest, nbytes):
            return False
        try:
            self._blobs.verified_path(digest)
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
            self._blobs.publish(target, digest, sum(each.nbytes for each in cuts))
            return digest
        finally:
            target.discard()

    # --- reading ------------------------------------------------------------------------

    def has(self, digest: str) -> bool:
        return self._blobs.has(digest) or self._recipe_entry(digest) is not None

    def size(self, digest: str) -> int:
        """Bytes; raises `ModelNotFound` when there is no such file."""
        if self._blobs.has(digest):
            return self._blobs.size(digest)
        return self._need(digest).size

    def open(self, digest: str) -> BinaryIO:
        """For reading, seekable; nothing is verified."""
        if self._blobs.has(digest):
            return self._blobs.open(digest)
        return io.BufferedReader(Assembled(self._need(digest).pieces, self._blobs.open))

    def touch(self, digest: str) -> None:
        """Keeps the file from the next `collect`; `ModelNotFound` when it is gone."""
        try:
            self._blobs.touch(digest)
        except ModelNotFound:
            try:
                self._storage.touch(_recipe_path(digest))
            except FileNotFoundError:
                raise _missing(digest) from None

    def path(self, digest: str, cache: Callable[[], BlobStore]) -> str:
        """The whole file on this machine, verified; put together in the cache when need be."""
        path = self._blobs.verified_path(digest)
        if path is not None:
            return path
        if not self.has(digest):
            raise _missing(digest)
        return cache().fetch(digest, self)

    def extents(self, digest: str, cache: Callable[[], BlobStore]) -> tuple[Extent, ...]:
        """Where the file lies on this machine, verified; what is not here is copied to the
        cache, parts that are there already not again."""
        path = self._blobs.verified_path(digest)
        if path is None:
            recipe = self._recipe(digest)
            if recipe is not None:
                return extents(recipe, self._fetch_parts(digest, recipe, cache))
            if not self._blobs.has(digest):
                raise _missing(digest)
            path = cache().fetch(digest, self._blobs)
        return (Extent(path, 0, Path(path).stat().st_size),)

    def _fetch_parts(
        self, digest: str, recipe: Recipe, cache: Callable[[], BlobStore]
    ) -> dict[str, str]:
        def fetch(part: str) -> str:
            if not self._local:
                return cache().fetch(part, self._blobs)
            path = self._blobs.verified_path(part)
            if path is None:
                if self._recipe_entry(digest) is None:
                    raise _missing(digest)  # collected in this moment
                raise Internal(f"the file {digest} is damaged: its part {part} is missing")
            return path

        return dict(zip(recipe.parts, self._for_each(fetch, recipe.parts), strict=True))

    def layout(self, digest: str, cache: Callable[[], BlobStore]) -> Layout | None:
        """What is inside; None when the file is not TorchScript. Made when it is missing or of
        another version of this program, and kept."""
        path = _layout_path(digest)
        with contextlib.suppress(FileNotFoundError):
            kept = open_layout(self._storage.read(path))
            if kept is not None:
                return kept
        try:
            with translated(), read_extents(self.extents(digest, cache)) as file:
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

    # --- garbage ------------------------------------------------------------------------

    def collect(self, used: set[str], min_age_s: float) -> Collected:
        """Removes files that are not used and older than `min_age_s` seconds, then the parts that
        no file needs any more, and layouts of what is gone. Under the storage's exclusive lock."""
        now = time.time()

        def kept(digest: str, entry: Entry) -> bool:
            return digest in used or entry.modified is None or now - entry.modified < min_age_s

        uploads = self._storage.sweep(min_age_s)
        files = parts = size = 0
        removed: set[str] = set()
        recipes = _by_digest(self._storage.find(RECIPES, 1))
        remaining = {digest for digest, entry in recipes.items() if kept(digest, entry)}
        # From the raw text: a recipe that cannot be read keeps its parts too.
        needed, dropped = (
            self._mentioned(digest for digest in recipes if (digest in remaining) is wanted)
            for wanted in (True, False)
        )
        for digest in recipes.keys() - remaining:
            self._storage.remove(recipes[digest].path)
            removed.add(digest)
            files += 1
            size += recipes[digest].size
        for digest, entry in self._blobs.entries().items():
            if digest in needed or kept(digest, entry):
                remaining.add(digest)
                continue
            self._blobs.remove(digest)
            removed.add(digest)
            size += entry.size
            if digest in dropped:
                parts += 1
            else:
                files += 1
        for digest, entry in _by_digest(self._storage.find(LAYOUTS, 1)).items():
            if digest not in remaining and (digest in removed or not kept(digest, entry)):
                self._storage.remove(entry.path)
        return Collected(files, size, uploads, parts)

    def _mentioned(self, recipes: Iterable[str]) -> set[str]:
        texts = self._storage.read_many(_recipe_path(digest) for digest in recipes)
        return {found.decode() for text in texts.values() for found in _MENTION.findall(text)}


def _take_apart(stage: Stage, size: int) -> tuple[Layout | None, list[Cut] | None]:
    with stage.reopen() as file:
        try:
            layout = read_layout(file)
        except InvalidRequest:
            return None, None
    return layout, cut(layout.blocks, size)


def _by_digest(entries: Iterable[Entry]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        with contextlib.suppress(InvalidRequest):  # a file that somebody else put there
            found[check_digest(f"sha256:{entry.path.rpartition('/')[2]}")] = entry
    return found


def _recipe_path(digest: str) -> str:
    return _path(RECIPES, digest)


def _layout_path(digest: str) -> str:
    return _path(LAYOUTS, digest)


def _path(folder: str, digest: str) -> str:
    hexadecimal = check_digest(digest).removeprefix("sha256:")
    return f"{folder}/{hexadecimal[:2]}/{hexadecimal}"


def _missing(digest: str) -> ModelNotFound:
    return ModelNotFound(f"the repository has no file {digest}")
