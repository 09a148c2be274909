"""API keys in the registry: who presents one is its tenant, and may do what its scopes say.

`keys/<id>.json` holds all of a key but its secret, of which it has the SHA-256. The secret is 256
random bits, so nothing can be gained by trying candidates against the digest, and a slow hash, as
passwords need it, would only slow requests down. A revoked key's file stays: its id is never used
again, people can see when it went, and a service that asks for keys does not stop doing so because
the last one was revoked.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Final, Literal, get_args

import msgspec
import structlog

from shared.errors import InvalidRequest, ModelNotFound, RoostError
from shared.storage import Storage
from shared.tenants import check_tenant

Scope = Literal["infer", "push", "metrics", "admin"]
SCOPES: Final = get_args(Scope)

KEYS: Final = "keys"
PREFIX: Final = "rk"
"""Keys are `rk_<id>_<secret>`: one pattern for secret scanners, one word for a double click."""
TOKEN: Final = r"rk_[0-9a-f]{12}_[0-9a-f]{64}"  # noqa: S105  (a pattern)
_SUFFIX: Final = ".json"
_ID: Final = re.compile(r"[0-9a-f]{12}\Z")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}\Z")
_NOTE_CHARS: Final = 200

log = structlog.get_logger(__name__)


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One key as the registry has it."""

    id: str
    tenant: str = ""
    """Whose it is. Empty: nobody's in particular; it may ask all models."""
    scopes: tuple[Scope, ...]
    """`infer`: ask models, submit jobs. `push`: register, remove, load, unload, alias models of
    its tenant. `metrics`: read metrics. `admin`: all that, and everything else."""
    sha256: str
    """Of the secret's 64 characters, in hexadecimal."""
    created: float
    """Unix time, as the next two."""
    expires: float | None = None
    revoked: float | None = None
    note: str = ""
    """For people."""

    def __post_init__(self) -> None:
        if not _ID.match(self.id) or not _DIGEST.match(self.sha256):
            raise InvalidRequest("a key's id has 12, its digest 64 hexadecimal digits")
        if self.tenant:
            check_tenant(self.tenant)
        if not self.scopes or len(set(self.scopes)) != len(self.scopes):
            raise InvalidRequest(f"a key has one or more of the scopes {', '.join(SCOPES)}")
        if self.tenant and not {"infer", "push"}.issuperset(self.scopes):
            # What these tell or change is everybody's.
            raise InvalidRequest("a tenant's key has the scopes infer or push, or both")
        if len(self.note) > _NOTE_CHARS or not self.note.isprintable():
            raise InvalidRequest(f"a note has at most {_NOTE_CHARS} printable characters")

    def state(self, now: float) -> Literal["valid", "expired", "revoked"]:
        """At a Unix time."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "valid"


def new_key(
    tenant: str = "",
    scopes: Iterable[Scope] = ("infer",),
    *,
    lifetime_s: float | None = None,
    note: str = "",
) -> tuple[Key, str]:
    """A new key and what its holder presents, which nothing else knows. `lifetime_s` None: until
    it is revoked. Raises `InvalidRequest`."""
    now = time.time()
    if lifetime_s is not None and not 0 < lifetime_s < 1e11:
        raise InvalidRequest("a key's lifetime must be above 0 s")
    secret = secrets.token_hex(32)
    key = Key(
        id=secrets.token_hex(6),
        tenant=tenant,
        scopes=tuple(scopes),
        sha256=hashlib.sha256(secret.encode()).hexdigest(),
        created=now,
        expires=None if lifetime_s is None else now + lifetime_s,
        note=note,
    )
    return key, f"{PREFIX}_{key.id}_{secret}"


class Table(msgspec.Struct, frozen=True):
    """All keys at one moment."""

    keys: Mapping[str, Key] = {}
    """By id, revoked and expired ones too."""
    some: bool = False
    """Whether there is any, readable or not."""


class Keys:
    """Those of one storage. May be called from several threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._seen: dict[str, tuple[object, Key | None]] = {}
        """Stamp and content by path; None for a file that cannot be read."""

    def add(self, key: Key) -> None:
        """Durable on return."""
        self._storage.create(_path(key.id), _encoded(key))

    def revoke(self, id_: str) -> Key:
        """The key is worth nothing from now on; durable on return, and idempotent. Raises
        `ModelNotFound` for an id that is nobody's."""
        if not _ID.match(id_):
            raise InvalidRequest("a key's id has 12 hexadecimal digits")
        try:
            key = _decoded(_path(id_), self._storage.read(_path(id_)))
        except FileNotFoundError:
            raise ModelNotFound(f"there is no key {id_}") from None
        if key is None:
            raise InvalidRequest(f"the file of key {id_} cannot be read: remove it by hand")
        if key.revoked is None:
            key = msgspec.structs.replace(key, revoked=time.time())
            self._storage.replace(_path(id_), _encoded(key))
        return key

    def look(self) -> Table:
        """All keys now; only files that have changed are read. One that cannot be read is left
        out, which is logged once. Raises `Unavailable`."""
        found = {
            entry.path: entry.stamp
            for entry in self._storage.find(KEYS, 0)
            if entry.path.endswith(_SUFFIX)
        }
        before = self._seen
        seen = {path: before[path] for path, at in found.items() if before.get(path, (0,))[0] == at}
        unread = [path for path in found if path not in seen]
        for path, data in self._storage.read_many(unread).items():
            seen[path] = (found[path], _decoded(path, data))
        self._seen = seen
        keys = {key.id: key for _, key in seen.values() if key is not None}
        return Table(keys, some=bool(found))


def _decoded(path: str, data: bytes) -> Key | None:
    try:
        key = msgspec.json.decode(data, type=Key)
    except (msgspec.MsgspecError, ValueError, RecursionError, RoostError) as error:
        log.warning("key_skipped", path=path, error=str(error))
        return None
    if path != _path(key.id):
        log.warning("key_skipped", path=path, error=f"it is that of key {key.id}")
        return None
    return key


def _encoded(key: Key) -> bytes:
    return msgspec.json.format(msgspec.json.encode(key), indent=2)


def _path(id_: str) -> str:
    return f"{KEYS}/{id_}{_SUFFIX}"
