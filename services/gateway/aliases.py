"""Aliases over HTTP: what is asked becomes a new document in the registry, and what is pending is
told with what it waits for. It flips when the placer says so (services/placer/aliases.py)."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import structlog

from services.gateway.callers import Callers
from services.gateway.core.placement import placements
from services.gateway.registry import Registry
from shared.aliases import (
    LATEST,
    Alias,
    Aliases,
    check_alias,
    check_split,
    heaviest,
    missing,
    most_copies,
    needed,
)
from shared.catalog import Catalog
from shared.errors import InvalidRequest, ModelNotFound
from shared.names import check_name, check_version, model_id
from shared.repository import Repository
from shared.store.port import Store, StoreUnavailable

log = structlog.get_logger(__name__)

MAX_WAIT_S: Final = 50.0
"""Less than the minute after which Triton's clients, and many others, give up."""
_LOOK_S: Final = 0.05
"""How often a waiter looks at what this gateway remembers, which a hint corrects."""
_ETAG: Final = re.compile(r'"?([0-9]{1,18})"?\Z')


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an alias is to lead: to one version, or to several by their weights."""

    version: int | str | None = None
    split: dict[int, int] | None = None
    now: bool = False
    """Without waiting until it is bound as often as what the alias leads to at present."""

    def weights(self) -> dict[int, int]:
        """Raises `InvalidRequest`."""
        if (self.version is None) == (self.split is None):
            raise InvalidRequest("an alias takes either a version or a split")
        if self.split is not None:
            return check_split(self.split)
        return {check_version(self.version): 1} if self.version is not None else {}


_wishes: Final = msgspec.json.Decoder(Wish)


def decode_wish(body: bytes) -> Wish:
    """Raises `InvalidRequest` that says what is wrong and where."""
    try:
        return _wishes.decode(body)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise InvalidRequest(f"the alias is not valid: {str(error)[:300]}") from None


def parse_revision(if_match: str | None) -> int | None:
    """Of the header `If-Match`. Raises `InvalidRequest`."""
    if if_match is None or if_match.strip() == "*":
        return None
    told = _ETAG.match(if_match.strip())
    if told is None:
        raise InvalidRequest("If-Match must be a revision, as ETag tells it")
    return int(told[1])


def parse_wait(text: str | None) -> float:
    """Seconds. Raises `InvalidRequest`."""
    try:
        wait_s = 0.0 if text is None else float(text)
    except ValueError:
        wait_s = math.nan
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise InvalidRequest(f"wait must be a number of seconds from 0 to {MAX_WAIT_S:g}")
    return wait_s


class AliasAdmin:
    """Changes aliases, and tells of them."""

    def __init__(
        self,
        repository: Repository,
        catalog: Catalog,
        registry: Registry,
        store: Store,
        callers: Callers,
    ) -> None:
        self._callers = callers
        self._repository = repository
        self._catalog = catalog
        self._registry = registry
        self._store = store

    async def put(
        self, name: str, alias: str, wish: Wish, revision: int | None, wait_s: float
    ) -> Aliases:
        """What stands afterwards, at most `wait_s` seconds later; `pending` in it has not happened
        yet. Raises `InvalidRequest`; `ModelNotFound` for model and versions; `Conflict` when the
        aliases are not at `revision` any more."""
        if check_alias(alias) == LATEST:
            raise InvalidRequest(f"{LATEST!r} is always the highest version")
        split = wish.weights()
        await self._callers.check_change(name)
        now = time.time()

        def edit(present: Aliases) -> Aliases:
            newest = self._repository.versions.numbers(name)[-1:] or [0]
            return present.lead(alias, split, newest[0], now, at_once=wish.now)

        document = await asyncio.to_thread(self._repository.edit_aliases, name, edit, revision)
        log.info("alias_changed", model=name, alias=alias, split=split, at_once=wish.now)
        await self._registry.changed(name)
        return await self._settled(name, alias, document, wait_s)

    async def remove(self, name: str, alias: str, revision: int | None) -> None:
        """Raises `ModelNotFound`, `Conflict`."""
        check_alias(alias)
        await self._callers.check_change(name)

        def edit(present: Aliases) -> Aliases:
            if alias not in present.aliases:
                raise _unknown(name, alias)
            return present.without(alias)

        await asyncio.to_thread(self._repository.edit_aliases, name, edit, revision)
        log.info("alias_removed", model=name, alias=alias)
        await self._registry.changed(name)

    async def tell(self, name: str) -> tuple[int, list[dict[str, Any]]]:
        """Revision and aliases of a model. Raises `ModelNotFound`."""
        document = await self._read(name)
        names = sorted(document.aliases)
        return document.revision, [await self.describe(name, each, document) for each in names]

    async def tell_one(self, name: str, alias: str) -> tuple[int, dict[str, Any]]:
        """Revision of all, and the one. Raises `ModelNotFound`."""
        document = await self._read(name)
        if check_alias(alias) not in document.aliases:
            raise _unknown(name, alias)
        return document.revision, await self.describe(name, alias, document)

    async def describe(self, name: str, alias: str, document: Aliases) -> dict[str, Any]:
        """One alias, for people and programs."""
        found = document.aliases[alias]
        told: dict[str, Any] = {
            "model": name,
            "alias": alias,
            "version": str(heaviest(found.split)),
            "split": _weights(found.split),
            "pending": None,
            "given_up": None,
        }
        if found.given_up is not None:
            told["given_up"] = {
                "split": _weights(found.given_up.split),
                "why": found.given_up.why,
                "at": found.given_up.at,
            }
        if found.pending is not None:
            told["pending"] = {
                "split": _weights(found.pending.split),
                "for_s": max(time.time() - found.pending.since, 0.0),
                "waits_for": await self._waits_for(name, found),
            }
        return told

    # --- parts ------------------------------------------------------------------------------

    async def _read(self, name: str) -> Aliases:
        """As it stands: who has just changed it may ask another gateway."""
        check_name(name)
        # Also of a model that is unloaded; raises when there is none.
        await self._catalog.get(name, even_unloaded=True)
        return await asyncio.to_thread(self._repository.edit_aliases, name, lambda same: same)

    async def _settled(self, name: str, alias: str, document: Aliases, wait_s: float) -> Aliases:
        """Waits while the alias is pending, as far as this gateway hears of it."""
        end = time.monotonic() + wait_s
        while _is_pending(document, alias) and time.monotonic() < end:
            await asyncio.sleep(_LOOK_S)
            known = await self._catalog.aliases(name)
            if known.revision > document.revision:
                document = known
        return document

    async def _waits_for(self, name: str, alias: Alias) -> list[str]:
        """In words; as the workers' reports tell it, which is what the placer goes by."""
        try:
            reports = await self._store.reports()
        except StoreUnavailable as error:
            return [f"where models are is not known: {error.message}"]
        workers = sum(report.engine_up and not report.draining for report in reports)
        where = placements(reports)
        bound, most, failed = {}, {}, []
        for version in sorted(alias.versions()):
            place = where.get(model_id(name, version))
            bound[version] = 0 if place is None else len(place.bound)
            try:
                manifest = await self._catalog.get(name, version, even_unloaded=True)
            except ModelNotFound as error:
                return [error.message]
            most[version] = most_copies(manifest, workers)
            if place is not None and alias.pending is not None and version in alias.pending.split:
                failed += [f"version {version} on {w}: {why}" for w, why in place.failed.items()]
        waits = missing(needed(alias, bound, most), bound)
        return [*waits, *failed] or ["the placer"]


def _is_pending(document: Aliases, alias: str) -> bool:
    found = document.aliases.get(alias)
    return found is not None and found.pending is not None


def _weights(split: Mapping[int, int]) -> dict[str, int]:
    return {str(version): weight for version, weight in sorted(split.items())}


def _unknown(name: str, alias: str) -> ModelNotFound:
    return ModelNotFound(f"model {name!r} has no alias {alias!r}")
