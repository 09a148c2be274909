"""Names for versions: which version, or which mix of versions, an alias of a model leads to.

An alias leads to a *split*: versions with weights, mostly a single one. `latest` is always the
highest version; the alias `default`, where there is one, is what the model's bare name means.
A change can wait until the versions that it leads to are bound as often as the present ones are:
it is *pending* until the placer says so (docs/adr/0020).

Everything here is pure; how the documents are kept: shared/aliasfiles.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from shared.errors import InvalidRequest
from shared.models import Manifest
from shared.names import check_version

LATEST: Final = "latest"
DEFAULT: Final = "default"
MAX_WEIGHT: Final = 1_000_000
MAX_VERSIONS: Final = 16
"""In one split."""
MAX_ALIASES: Final = 64
"""Of one model."""
_ALIAS: Final = re.compile(r"[a-z][a-z0-9_-]{0,62}\Z")
_POINTS: Final = 2**64

Split = Mapping[int, int]
"""Weights by version; each at least 1, their sum is the whole."""


def check_alias(name: str) -> str:
    """Returns `name`, or raises `InvalidRequest` when no alias can be called that."""
    if not _ALIAS.match(name):
        raise InvalidRequest(
            f"{name[:40]!r} is neither a version, a whole number from 1, nor an alias: 1 to 63 of "
            "a-z 0-9 _ -, beginning with a letter"
        )
    return name


def check_address(version: int | str) -> str:
    """What may stand for a version in an address: a number, `latest` or an alias. Raises
    `InvalidRequest`."""
    text = str(version)
    return check_alias(text) if text[:1].isalpha() else str(check_version(version))


def check_split(weights: Mapping[int, int]) -> dict[int, int]:
    """The split, by version, without those of weight 0. Raises `InvalidRequest`."""
    if any(not 0 <= weight <= MAX_WEIGHT for weight in weights.values()):
        raise InvalidRequest(f"a weight is a whole number from 0 to {MAX_WEIGHT}")
    split = {check_version(v): weight for v, weight in sorted(weights.items()) if weight}
    if not 1 <= len(split) <= MAX_VERSIONS:
        raise InvalidRequest(f"a split has 1 to {MAX_VERSIONS} versions with a weight above 0")
    return split


def choose(split: Split, point: float) -> int:
    """The version at `point`, which is in [0, 1). In the order of their numbers, so that a
    point which has the highest version keeps it while that version's share grows."""
    at, passed = point * sum(split.values()), 0
    for version, weight in sorted(split.items()):
        passed += weight
        if at < passed:
            return version
    return max(split)  # a product that was rounded up to the whole


def point_of(model: str, key: str) -> float:
    """Where a client stands, always the same for one model: in [0, 1)."""
    digest = hashlib.blake2b(f"{model}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (_POINTS >> 11)


def heaviest(split: Split) -> int:
    """The version with the most weight, of equals the lowest: what stands for the split where
    only one version can."""
    return min(split, key=lambda version: (-split[version], version))


class Pending(msgspec.Struct, frozen=True):
    """A change that waits for its versions to be bound."""

    split: dict[int, int]
    since: float
    """Unix time in seconds."""


class GivenUp(msgspec.Struct, frozen=True):
    """A change that was pending, and never will be so."""

    split: dict[int, int]
    why: str
    at: float
    """Unix time in seconds."""


class Alias(msgspec.Struct, frozen=True, omit_defaults=True):
    split: dict[int, int]
    pending: Pending | None = None
    given_up: GivenUp | None = None
    """The last wish, if it was given up; until the next one."""

    def versions(self) -> set[int]:
        """All that it leads to, or is about to."""
        return {*self.split, *(self.pending.split if self.pending is not None else ())}


class Aliases(msgspec.Struct, frozen=True, omit_defaults=True):
    """Those of one model. Changes return another document, with the same revision: it is
    counted when it is written."""

    revision: int = 0
    """0 where nothing was ever written."""
    aliases: dict[str, Alias] = {}
    gone: tuple[str, ...] = ()
    """Names that once led somewhere: the broker may have routes of them yet."""

    def split_of(self, alias: str) -> dict[int, int] | None:
        found = self.aliases.get(alias)
        return None if found is None else found.split

    def users(self, version: int) -> list[str]:
        """The aliases that lead to the version, or are about to."""
        return sorted(name for name, alias in self.aliases.items() if version in alias.versions())

    def versions(self) -> set[int]:
        """All that some alias leads to, or is about to."""
        return {version for alias in self.aliases.values() for version in alias.versions()}

    def lead(
        self, name: str, split: dict[int, int], newest: int, now: float, *, at_once: bool = False
    ) -> Aliases:
        """The alias is to lead to `split`: when that is bound, or `at_once`. An alias that is new
        has nothing to wait for, except `default`, of which requests came to `newest` so far."""
        present = self.split_of(name)
        if present is None and name == DEFAULT:
            present = {newest: 1}
        if at_once or present is None or present == split:
            return self._put(name, Alias(split))
        pending = Pending(split, now)
        before = self.aliases.get(name)
        if before is not None and before.pending is not None and before.pending.split == split:
            pending = before.pending
        return self._put(name, Alias(present, pending))

    def flip(self, name: str) -> Aliases:
        """What is pending is so from now on."""
        alias = self.aliases.get(name)
        if alias is None or alias.pending is None:
            return self
        return self._put(name, Alias(alias.pending.split))

    def give_up(self, name: str, why: str, now: float) -> Aliases:
        """What is pending will not happen: the alias goes on to lead where it does."""
        alias = self.aliases.get(name)
        if alias is None or alias.pending is None:
            return self
        return self._put(name, Alias(alias.split, None, GivenUp(alias.pending.split, why, now)))

    def without(self, name: str) -> Aliases:
        rest = {each: alias for each, alias in self.aliases.items() if each != name}
        gone = (*(each for each in self.gone if each != name), name)[-MAX_ALIASES:]
        return msgspec.structs.replace(self, aliases=rest, gone=gone)

    def cleared(self) -> Aliases:
        """Of a model that was removed. Its revisions go on from here, should it come back."""
        return Aliases(self.revision)

    def _put(self, name: str, alias: Alias) -> Aliases:
        aliases = {**self.aliases, name: alias}
        if len(aliases) > MAX_ALIASES:
            raise InvalidRequest(f"a model has at most {MAX_ALIASES} aliases")
        return msgspec.structs.replace(
            self, aliases=aliases, gone=tuple(each for each in self.gone if each != name)
        )


NONE: Final = Aliases()


def most_copies(manifest: Manifest, workers: int) -> int:
    """More copies than that there cannot be."""
    if manifest.stateful:
        return min(1, workers)
    return workers if manifest.max_copies is None else min(workers, manifest.max_copies)


def needed(alias: Alias, bound: Mapping[int, int], most: Mapping[int, int]) -> dict[int, int]:
    """How often each version of what is pending is to be bound before the alias may flip.

    Together as often as the present ones are (`bound`), each with its share, but nowhere more
    often than can be (`most`). Nothing where the present ones are bound nowhere: then they are as
    cold as the new ones.
    """
    if alias.pending is None:
        return {}
    split, total = alias.pending.split, sum(alias.pending.split.values())
    copies = sum(bound.get(version, 0) for version in alias.split)
    return {
        version: min(-(-copies * weight // total), most[version])
        for version, weight in split.items()
    }


def missing(needs: Mapping[int, int], bound: Mapping[int, int]) -> list[str]:
    """What a flip waits for, in words; nothing when it is due."""
    return [
        f"version {version} has {bound.get(version, 0)} of {need} bindings"
        for version, need in sorted(needs.items())
        if bound.get(version, 0) < need
    ]
