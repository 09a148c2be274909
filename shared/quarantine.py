"""Which model versions kill engines, and are therefore kept from all of them.

Workers write down what died of which version: `quarantine/<name>@<version>@<ms>-<id>.json`, one
small file for each death, none of which ever changes. Whether a version is quarantined follows from
its files (`verdict`), so that deaths on several workers count together and nobody has to agree with
anybody. They lie in the registry since that is what survives every restart, and what workers,
gateways and the placer all look at (docs/adr/0022). Usually the folder is empty.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Final, Literal

import msgspec
import structlog

from shared.errors import Quarantined
from shared.names import ModelId, is_name, model_id, split_model_id
from shared.storage import Entry, Storage

QUARANTINE: Final = "quarantine"
MAX_REQUESTS: Final = 2
"""Requests that ended engines before their model is kept from them: one may be the request's own
fault, at two it is the model's."""
APART_S: Final = 24 * 3600.0
"""Between two such requests; a single one is forgotten after as long."""
_REASON_CHARS: Final = 500
_FILE: Final = re.compile(r"([^/@]+)@([1-9][0-9]{0,9})@([0-9]{1,15})-[0-9a-f]{8}\.json\Z")

log = structlog.get_logger(__name__)


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker saw: engines ended, and this was the cause."""

    kind: Literal["load", "request"]
    """`load`: it ended engines as it was loaded, the last one with nothing beside it. `request`:
    one of its requests ended engines, the last one with nothing beside it."""
    worker: str
    at: float
    """Unix time."""
    reason: str


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A version that is quarantined."""

    model: ModelId
    reason: str
    since: float
    """Unix time of the death that decided."""
    worker: str
    """That saw it."""
    deaths: tuple[Death, ...] = ()
    """All of them, the oldest first."""

    def error(self) -> Quarantined:
        """What whoever asks for it is told."""
        return Quarantined(f"{self.model} is quarantined: {self.reason}")


def verdict(model: ModelId, deaths: Iterable[Death]) -> Held | None:
    """Whether these deaths are enough: one by a load, which was tried again alone before, or
    `MAX_REQUESTS` by requests, each within `APART_S` of the one before."""
    known = sorted(deaths, key=lambda death: (death.at, death.kind, death.worker, death.reason))
    requests, before = 0, 0.0
    for death in known:
        if death.kind == "request":
            requests = requests + 1 if death.at - before <= APART_S else 1
            before = death.at
            if requests < MAX_REQUESTS:
                continue
            reason = f"{requests} of its requests ended engines"
        else:
            reason = death.reason
        return Held(
            model=model,
            reason=reason,
            since=death.at,
            worker=death.worker,
            deaths=tuple(known),
        )
    return None


class Quarantine:
    """The deaths of one storage. May be called from several threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._decoded: dict[str, Death | None] = {}
        """By path; None for what cannot be read."""

    def add(self, model: ModelId, death: Death) -> None:
        """Durable on return. Deaths that no longer count go at the same time. Raises
        `Unavailable`."""
        name, version = split_model_id(model)
        reason = death.reason[:_REASON_CHARS]
        told = msgspec.json.encode(msgspec.structs.replace(death, reason=reason))
        self._storage.create(_path(name, version, death.at), told)
        if self.of(model) is None:
            for entry, at in self._files().get(model, ()):
                if death.at - at > APART_S:
                    self._remove(entry.path)

    def held(self) -> dict[ModelId, Held]:
        """All that is quarantined. Costs one listing, and the files that are new."""
        found = self._files()
        deaths = self._read([entry.path for files in found.values() for entry, _ in files])
        told = {}
        for model, files in found.items():
            known = [death for entry, _ in files if (death := deaths.get(entry.path)) is not None]
            if (held := verdict(model, known)) is not None:
                told[model] = held
        return told

    def of(self, model: ModelId) -> Held | None:
        """Of one version, as `held`."""
        return self.held().get(model)

    def forget(self, model: ModelId) -> bool:
        """Removes what is known of the version: it may be loaded again. Whether it was
        quarantined."""
        was = self.of(model) is not None
        for entry, _ in self._files().get(model, ()):
            self._remove(entry.path)
        return was

    def _files(self) -> dict[ModelId, list[tuple[Entry, float]]]:
        """By model, and of each when it was (Unix time)."""
        found: dict[ModelId, list[tuple[Entry, float]]] = {}
        for entry in self._storage.find(QUARANTINE, 0):
            match = _FILE.match(entry.path.rpartition("/")[2])
            if match is not None and is_name(match[1]):  # else it is not ours
                model = model_id(match[1], int(match[2]))
                found.setdefault(model, []).append((entry, int(match[3]) / 1000))
        return found

    def _read(self, paths: list[str]) -> Mapping[str, Death | None]:
        before = self._decoded
        contents = self._storage.read_many([path for path in paths if path not in before])
        known = {path: before[path] for path in paths if path in before}
        known |= {path: _decoded(path, content) for path, content in contents.items()}
        self._decoded = known
        return known

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._storage.remove(path)


def _path(name: str, version: int, at: float) -> str:
    return f"{QUARANTINE}/{name}@{version}@{int(at * 1000)}-{uuid.uuid4().hex[:8]}.json"


def _decoded(path: str, content: bytes) -> Death | None:
    try:
        return msgspec.json.decode(content, type=Death)
    except (ValueError, RecursionError) as error:
        log.warning("death_unreadable", path=path, error=str(error))
        return None
