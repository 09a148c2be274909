"""The aliases of models, kept in the registry.

Everything of one model stands in one small document, `aliases/<model>@<revision>.json`. A change
is a new file with the next number, created exclusively: of two writers one loses, on a bucket too.
The last two revisions stay, so that who has just listed them still finds what it listed. All lie in
one folder, since every service that is asked lists it every 2 s.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import msgspec
import structlog

from shared.aliases import MAX_ALIASES, Aliases, check_alias, check_split
from shared.errors import Conflict, InvalidRequest
from shared.names import check_name, is_name
from shared.storage import Entry, Storage

ALIASES: Final = "aliases"
MAX_BYTES: Final = 256 << 10
"""Of one document: 64 aliases of splits in 16, twice where they are pending. What is longer is
read so far, and is no JSON then."""
_FILE: Final = re.compile(r"([^/@]+)@([1-9][0-9]{0,17})\.json\Z")

log = structlog.get_logger(__name__)


class _Decoded(NamedTuple):
    path: str
    stamp: tuple[object, ...]
    document: Aliases


class AliasFolder:
    """The documents of one storage. May be called from several threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._decoded: dict[str, _Decoded] = {}
        """By model, for listings."""

    def read(self, name: str) -> Aliases:
        """What stands now. Raises `Unavailable`."""
        while True:
            revisions = self._revisions(name)
            for revision in reversed(revisions):
                path = _path(name, revision)
                with contextlib.suppress(FileNotFoundError):
                    found = _decoded(path, self._storage.read(path))
                    if found is not None:
                        # The highest number, also where that file is broken: it is taken.
                        return msgspec.structs.replace(found, revision=revisions[-1])
            # It has moved on by two revisions in between, or there is nothing to be read.
            if revisions == self._revisions(name):
                return Aliases(max(revisions, default=0))

    def read_all(self) -> dict[str, Aliases]:
        """Of all models that ever had some. Costs one listing, and the documents that are new."""
        newest: dict[str, tuple[int, Entry]] = {}
        for name, revision, entry in self._entries():
            if revision > newest.get(name, (0, entry))[0]:
                newest[name] = (revision, entry)
        before, found = self._decoded, dict[str, _Decoded]()
        unread = {}
        for name, (revision, entry) in newest.items():
            known = before.get(name)
            if known is not None and known.path == entry.path and known.stamp == entry.stamp:
                found[name] = known
            else:
                unread[entry.path] = (name, revision, entry.stamp)
        contents = self._storage.read_many(unread)
        for path, (name, revision, stamp) in unread.items():
            document = _decoded(path, contents[path]) if path in contents else None
            if document is None:  # it moved on in between, or is broken: the one before it holds
                document = self.read(name)
            else:
                document = msgspec.structs.replace(document, revision=revision)
            found[name] = _Decoded(path, stamp, document)
        self._decoded = found
        return {name: known.document for name, known in found.items()}

    def edit(
        self,
        name: str,
        edit: Callable[[Aliases], Aliases],
        check: Callable[[int], object],
        revision: int | None,
    ) -> Aliases:
        """What `edit` makes of the model's aliases; it is called again when somebody else was
        faster. `check` raises for a version that is not there. Raises what these two raise, and
        `Conflict` when the aliases are not at `revision`, None for whatever they are at."""
        while True:
            # The lock keeps versions from being removed in between.
            with self._storage.lock(exclusive=False):
                present = self.read(name)
                if revision is not None and present.revision != revision:
                    raise Conflict(
                        f"the aliases of model {name!r} are at revision {present.revision}, "
                        f"not at {revision}"
                    )
                edited = edit(present)
                if edited == present:
                    return present
                for version in sorted(edited.versions() - present.versions()):
                    check(version)
                try:
                    return self.write(name, edited)
                except Conflict:
                    if revision is not None:
                        raise

    def write(self, name: str, document: Aliases) -> Aliases:
        """Takes the place of the revision that the document was made from; durable on return.
        Raises `Conflict` when somebody else has taken it."""
        fresh = msgspec.structs.replace(document, revision=document.revision + 1)
        try:
            self._storage.create(_path(name, fresh.revision), msgspec.json.encode(fresh))
        except FileExistsError:
            raise Conflict(
                f"the aliases of model {name!r} were changed meanwhile: "
                f"they are beyond revision {document.revision}"
            ) from None
        for revision in self._revisions(name):
            if revision < document.revision:
                with contextlib.suppress(FileNotFoundError):
                    self._storage.remove(_path(name, revision))
        return fresh

    def clear(self, name: str) -> None:
        """The model was removed."""
        while True:
            present = self.read(name)
            if not present.aliases and not present.gone:
                return
            with contextlib.suppress(Conflict):
                self.write(name, present.cleared())

    def _revisions(self, name: str) -> list[int]:
        check_name(name)
        return sorted(revision for found, revision, _ in self._entries() if found == name)

    def _entries(self) -> Iterator[tuple[str, int, Entry]]:
        """Model, revision and file of all documents."""
        for entry in self._storage.find(ALIASES, 0):
            file = _FILE.match(entry.path.rpartition("/")[2])
            if file is not None and is_name(file[1]):
                yield file[1], int(file[2]), entry


def _path(name: str, revision: int) -> str:
    return f"{ALIASES}/{name}@{revision}.json"


_decode: Final = msgspec.json.Decoder(Aliases).decode


def _decoded(path: str, data: bytes) -> Aliases | None:
    """None when it is broken, which is logged; then the revision before it holds."""
    try:
        found = _decode(data[: MAX_BYTES + 1])
        _check(found)
    except (msgspec.MsgspecError, ValueError, RecursionError, InvalidRequest) as error:
        log.warning("aliases_skipped", path=path, error=str(error)[:500])
        return None
    return found


def _check(found: Aliases) -> None:
    if max(len(found.aliases), len(found.gone)) > MAX_ALIASES:
        raise InvalidRequest(f"it has more than {MAX_ALIASES} aliases")
    for name, alias in found.aliases.items():
        check_alias(name)
        check_split(alias.split)
        if alias.pending is not None:
            check_split(alias.pending.split)
