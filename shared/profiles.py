"""What workers measured of models, for each kind of device:
`models/<name>/<version>/profiles/<device kind>.json`."""

from __future__ import annotations

import hashlib
import re
from typing import Final

import msgspec
import structlog

from shared.errors import ModelNotFound
from shared.manifests import MODELS, manifest_path
from shared.models import Profile
from shared.names import ModelId, split_model_id
from shared.storage import Storage

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")

_log = structlog.get_logger(__name__)
_decode = msgspec.json.Decoder(Profile).decode


class Profiles:
    """Those of one storage. May be called from several threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def get(self, model: ModelId, device_kind: str) -> Profile | None:
        """What was measured of a model on this kind of device; None when nothing was, or when
        it cannot be read (it can be measured again)."""
        path = profile_path(model, device_kind)
        try:
            profile = _decode(self._storage.read(path))
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            _log.warning("profile_skipped", path=path, error=str(error))
            return None
        return profile if profile.device_kind == device_kind else None

    def put(self, model: ModelId, profile: Profile) -> None:
        """Keeps a measurement in place of the last one. Raises `ModelNotFound`."""
        path = profile_path(model, profile.device_kind)
        with self._storage.lock(exclusive=False):
            try:
                self._storage.entry(manifest_path(*split_model_id(model)))
            except FileNotFoundError:
                raise ModelNotFound(f"model {model!r} is not registered") from None
            self._storage.replace(path, msgspec.json.encode(profile))

    def forget(self, name: str, version: int) -> None:
        """Removes all of a version, if there are any. Under the storage's lock."""
        self._storage.remove_tree(_folder(name, version))


def profile_path(model: ModelId, device_kind: str) -> str:
    # Readable, and never the same for two kinds.
    readable = _UNSAFE.sub("_", device_kind)[:64]
    unique = hashlib.sha256(device_kind.encode()).hexdigest()[:8]
    return f"{_folder(*split_model_id(model))}/{readable}-{unique}.json"


def _folder(name: str, version: int) -> str:
    return f"{MODELS}/{name}/{version}/profiles"
