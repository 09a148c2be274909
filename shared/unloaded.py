"""Which models are unloaded: registered, but not to be asked until somebody loads them again.

`unloaded/<name>.json` says so of every version of a model, also of those that are
registered later. It lies in the registry because that is what survives every restart, and what
all gateways and the placer look at. Usually the folder is empty: one listing tells that nobody
has to look model by model.
"""

from __future__ import annotations

import contextlib
import time
from typing import Final

import msgspec

from shared.errors import InvalidRequest
from shared.names import check_name
from shared.storage import Storage

UNLOADED: Final = "unloaded"
_SUFFIX: Final = ".json"


class Unloaded:
    """Those of one storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def put(self, name: str) -> None:
        """Idempotent; the first time stays."""
        with contextlib.suppress(FileExistsError):
            self._storage.create(_path(name), msgspec.json.encode({"unloaded_at": time.time()}))

    def remove(self, name: str) -> bool:
        """Whether the model was unloaded."""
        try:
            self._storage.remove(_path(name))
        except FileNotFoundError:
            return False
        return True

    def names(self) -> frozenset[str]:
        found = set()
        for entry in self._storage.find(UNLOADED, 0):
            name = entry.path.rpartition("/")[2]
            with contextlib.suppress(InvalidRequest):  # a file that is not ours
                found.add(check_name(name.removesuffix(_SUFFIX)))
        return frozenset(found)


def _path(name: str) -> str:
    return f"{UNLOADED}/{name}{_SUFFIX}"
