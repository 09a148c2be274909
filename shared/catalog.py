"""The registry as a service asks it, many times a second, from an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from shared.aliases import DEFAULT, LATEST, NONE, Aliases, check_alias, heaviest
from shared.errors import ModelNotFound
from shared.models import Manifest
from shared.names import ModelId, check_name, check_version, split_model_id
from shared.quarantine import Held
from shared.repository import Repository
from shared.sharing import SharedBytes
from shared.tenants import Quota

TTL_S: Final = 2.0
"""How long an answer is believed without a hint that it has changed."""
NEGATIVE_TTL_S: Final = 0.2
"""How long "no such model" is believed. Short: the usual next step is to register it."""
MAX_ABSENT: Final = 1000
"""Absent names that are remembered; whoever asks for random names must not fill the memory."""

_Key = tuple[str, int | None]
_Answer = Manifest | ModelNotFound
_ALL: Final[_Key] = ("", None)
_SHARING: Final[_Key] = ("", 0)
_STANDING: Final[_Key] = ("", -4)
_UNLOADED: Final[_Key] = ("", -1)
_ALIASES: Final[_Key] = ("", -2)
_QUARANTINED: Final[_Key] = ("", -3)
_TENANTS: Final[_Key] = ("", -5)


class _Entry(msgspec.Struct, frozen=True):
    expires: float
    answer: object


class Catalog:
    """Manifests, cached for `ttl_s` seconds; each is looked up once, however many wait.

    Laws: an answer is never older than its time to live, nor than the last `invalidate` of its
    name; a caller that is cancelled cancels nobody else; failures other than absence are told
    to those who wait and forgotten. For one event loop.
    """

    def __init__(
        self,
        repository: Repository,
        ttl_s: float = TTL_S,
        clock: Callable[[], float] = time.monotonic,
        sees: Callable[[Manifest], bool] | None = None,
    ) -> None:
        """`sees` says whether a model exists for whoever asks at this moment (None: all do); what
        does not is answered as if it were not registered."""
        self._repository = repository
        self._sees = sees
        self._ttl_s = ttl_s
        self._clock = clock
        self._cached: dict[_Key, _Entry] = {}
        self._absent: dict[_Key, _Entry] = {}
        self._asking: dict[_Key, asyncio.Task[object]] = {}

    def __repr__(self) -> str:
        return (
            f"<Catalog cached={len(self._cached)} absent={len(self._absent)} "
            f"asking={len(self._asking)}>"
        )

    async def get(
        self, name: str, version: int | None = None, *, even_unloaded: bool = False
    ) -> Manifest:
        """One version; None for what the bare name means: where the alias `default` leads (the
        heaviest version of a split), else the highest. Raises `ModelNotFound`, also of a model
        that is unloaded unless `even_unloaded`; `InvalidRequest` when name or version are not
        such; `Unavailable` when the repository is."""
        if version is None:
            split = (await self.aliases(name)).split_of(DEFAULT)
            version = None if split is None else heaviest(split)
        return await self._get(name, version, even_unloaded=even_unloaded)

    async def newest(self, name: str) -> Manifest:
        """The highest version, whatever the bare name means. Raises as `get`."""
        return await self._get(name, None)

    async def named(self, name: str, version: str) -> Manifest:
        """As `get`, by a number, `latest` or an alias, in text."""
        return await self._get(name, heaviest(await self.split(name, version)))

    async def split(self, name: str, version: str) -> dict[int, int]:
        """Where a number, `latest` or an alias leads. Raises `ModelNotFound`, `InvalidRequest`,
        `Unavailable`."""
        if not version[:1].isalpha():
            return {check_version(version): 1}
        if version == LATEST:
            return {(await self.newest(name)).version: 1}
        known = await self.aliases(name)
        split = known.split_of(check_alias(version))
        if split is None:
            await self.newest(name)  # raises when there is no such model at all
            there = ", ".join(sorted(known.aliases)) or "none"
            raise ModelNotFound(f"model {name!r} has no alias {version!r}; it has {there}")
        return split

    async def aliases(self, name: str) -> Aliases:
        """Of one model; without any when it is not registered."""
        check_name(name)
        return (await self.all_aliases()).get(name, NONE)

    async def all_aliases(self) -> Mapping[str, Aliases]:
        """By model, of all that ever had some."""
        answer = await self._ask(_ALIASES, self._repository.aliases)
        assert isinstance(answer, dict)
        return answer

    async def _get(
        self, name: str, version: int | None, *, even_unloaded: bool = False
    ) -> Manifest:
        number = None if version is None else check_version(version)
        key = (check_name(name), number)
        answer = await self._ask(key, lambda: self._look_up(name, number))
        if self._sees is not None:
            await self._check_seen(name, answer, self._sees)
        if isinstance(answer, ModelNotFound):
            # A fresh one each time: a raised exception collects its raisers' frames.
            raise ModelNotFound(answer.message)
        assert isinstance(answer, Manifest)
        if not even_unloaded and name in await self.unloaded():
            raise ModelNotFound(f"model {name!r} is unloaded; load it before it is asked")
        return answer

    async def _check_seen(
        self, name: str, answer: object, sees: Callable[[Manifest], bool]
    ) -> None:
        """Raises `ModelNotFound`, in the words for a model that was never registered."""
        if not isinstance(answer, Manifest):
            # Of this version there is nothing to see, but of the model there may be.
            answer = await self._ask((name, None), lambda: self._look_up(name, None))
        if isinstance(answer, Manifest) and not sees(answer):
            raise ModelNotFound(f"model {name!r} is not registered")

    async def ids(self, *, even_unloaded: bool = False) -> list[Manifest]:
        """Every version that can be asked, sorted by name and version."""
        answer = await self._ask(_ALL, lambda: tuple(self._repository.versions.manifests()))
        assert isinstance(answer, tuple)
        unloaded = frozenset() if even_unloaded else await self.unloaded()
        return [
            manifest
            for manifest in answer
            if manifest.name not in unloaded and (self._sees is None or self._sees(manifest))
        ]

    async def standing(self) -> list[Manifest]:
        """As `ids`, of those that are to have copies at all times."""
        answer = await self._ask(_STANDING, lambda: tuple(self._repository.versions.standing()))
        assert isinstance(answer, tuple)
        unloaded = await self.unloaded()
        return [manifest for manifest in answer if manifest.name not in unloaded]

    async def registered(self, model: ModelId) -> bool:
        """Whether there is such a version, unloaded or not. Raises `Unavailable`."""
        try:
            await self._get(*split_model_id(model), even_unloaded=True)
        except ModelNotFound:
            return False
        return True

    async def unloaded(self) -> frozenset[str]:
        """The names of the models that are registered but not to be asked now."""
        answer = await self._ask(_UNLOADED, self._repository.unloaded)
        assert isinstance(answer, frozenset)
        return answer

    async def quarantined(self) -> Mapping[ModelId, Held]:
        """The versions that are kept from all engines since they ended too many."""
        answer = await self._ask(_QUARANTINED, self._repository.quarantined)
        assert isinstance(answer, dict)
        return answer

    async def quotas(self) -> Mapping[str, Quota]:
        """What tenants may take, by name, of those of whom something is said."""
        answer = await self._ask(_TENANTS, self._repository.tenants.quotas)
        assert isinstance(answer, dict)
        return answer

    async def check_runnable(self, model: ModelId) -> None:
        """Raises `Quarantined` where the version is; `Unavailable` when the repository is."""
        held = (await self.quarantined()).get(model)
        if held is not None:
            raise held.error()

    async def sharing(self) -> Mapping[ModelId, SharedBytes]:
        """How many bytes of each version are its own, and how many another one has too."""
        answer = await self._ask(_SHARING, self._repository.sharing)
        assert isinstance(answer, dict)
        return answer

    def invalidate(self, name: str | None = None) -> None:
        """Forgets what is known of a model, None for all: a hint that it has changed."""
        for table in (self._cached, self._absent, self._asking):
            for key in [key for key in table if name is None or key[0] in {name, ""}]:
                # Who is waiting still gets that answer; who asks from now on does not.
                del table[key]

    def _look_up(self, name: str, version: int | None) -> _Answer:
        try:
            return self._repository.versions.manifest(name, version)
        except ModelNotFound as error:
            return ModelNotFound(error.message)

    async def _ask(self, key: _Key, look_up: Callable[[], object]) -> object:
        entry = self._cached.get(key) or self._absent.get(key)
        if entry is not None and self._clock() < entry.expires:
            return entry.answer
        task = self._asking.get(key)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(look_up), name=f"look up {key[0]}")
            self._asking[key] = task
            asked_at = self._clock()
            task.add_done_callback(lambda done: self._remember(key, done, asked_at))
        return await asyncio.shield(task)

    def _let_go(self, key: _Key, expires: float) -> None:
        entry = self._cached.get(key)
        if entry is not None and entry.expires == expires:
            del self._cached[key]

    def _remember(self, key: _Key, done: asyncio.Task[object], asked_at: float) -> None:
        current = self._asking.get(key) is done
        if current:
            del self._asking[key]
        # Reading the exception also says that it was seen, when everybody who waited has left.
        if done.cancelled() or done.exception() is not None or not current:
            return
        answer = done.result()
        self._cached.pop(key, None)
        self._absent.pop(key, None)
        if not isinstance(answer, ModelNotFound):
            entry = self._cached[key] = _Entry(asked_at + self._ttl_s, answer)
            if not key[0]:  # of all models: too much to keep when it is not believed any more
                # Not the entry itself, which would outlive a hint that it has changed.
                done.get_loop().call_later(self._ttl_s, self._let_go, key, entry.expires)
            return
        if len(self._absent) >= MAX_ABSENT:
            del self._absent[next(iter(self._absent))]
        self._absent[key] = _Entry(asked_at + min(NEGATIVE_TTL_S, self._ttl_s), answer)
