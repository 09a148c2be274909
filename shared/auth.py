"""Whether a service asks for API keys, and who a caller is by the key it presents.

`auto`, the default, is off on loopback until there is a key, and beyond loopback the service does
not start without one: nobody puts it on a network by mistake. Once a service asks for keys it does
so until it ends, whatever is revoked meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import math
import socket
import time
from collections.abc import Callable
from typing import Final, Literal

import msgspec
import structlog

from shared.config import CommonConfig, ConfigError
from shared.errors import PermissionDenied, RoostError, Unauthenticated, Unavailable
from shared.keys import PREFIX, SCOPES, Key, Keys, Scope, Table

AuthMode = Literal["auto", "required", "off"]
Need = Literal["open", "read", "infer", "push", "metrics", "admin"]
"""What a caller must show: nothing, a key that asks or pushes models, or one with this scope."""

LOOK_S: Final = 1.0
"""How often keys are looked for: additions and revocations hold after this, and the time a look
takes."""
LOOK_AGAIN_S: Final = 0.2
"""How soon after a look an unknown key is worth another: so a new one works at once, and whoever
tries many causes five looks a second."""
BELIEVED_S: Final = 300.0
"""How long keys that were known stay valid while the repository is away."""
_SECRET_CHARS: Final = 64
_NOBODY: Final = bytes(32)

log = structlog.get_logger(__name__)


class Caller(msgspec.Struct, frozen=True):
    """Who asks."""

    tenant: str = ""
    scopes: frozenset[Scope] = frozenset(SCOPES)
    key: str = ""
    """Id of the key. Empty: none was asked for."""
    confined: bool = False
    """Only its tenant's models and those of nobody exist for it."""

    @property
    def admin(self) -> bool:
        """By a key, not because none was asked for."""
        return bool(self.key) and "admin" in self.scopes

    def check(self, need: Need) -> None:
        """Raises `PermissionDenied`."""
        if need not in self.scopes and "admin" not in self.scopes:
            enough = {"infer", "push"} if need == "read" else {need}
            if need != "open" and not enough & self.scopes:
                which = " or ".join(sorted(enough))
                raise PermissionDenied(f"this needs an API key with the scope {which}")


ANYBODY: Final = Caller()
"""Where no keys are asked for."""


class GuardedConfig(CommonConfig, frozen=True, kw_only=True):
    """What each service is told that may ask its callers for API keys."""

    auth: AuthMode = "auto"
    """Whether callers must show an API key (docs/security.md). `auto`: on loopback as soon as there
    is one; beyond loopback always, and without any key the service does not start. `required`:
    always. `off`: never, for where something else keeps strangers out."""
    metrics_open: bool = False
    """Whether `/metrics` is told without a key where keys are asked for. Else Prometheus shows one
    with the scope `metrics`."""

    @property
    def metrics_need(self) -> Need:
        """What whoever reads metrics must show."""
        return "open" if self.metrics_open else "metrics"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there: an address, or a name all of whose
    addresses are loopback. Empty, `0.0.0.0` and `::` are every network."""
    with contextlib.suppress(ValueError):
        return _loops(host.partition("%")[0])
    try:
        found = socket.getaddrinfo(host, None) if host else []
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(_loops(str(each[4][0]).partition("%")[0]) for each in found)


def _loops(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


class Gate:
    """Those who present a key, told from those who do not. One per service, on its event loop;
    without one, in threads, `look` and `check` do (one at a time).

    A caller's key is looked up in memory: some 2 µs, and nobody waits for the repository but who
    presents one that is not known.
    """

    def __init__(
        self,
        keys: Keys,
        mode: AuthMode,
        host: str,
        *,
        setting: str,
        encrypted: bool = False,
        further: Key | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`host` is where the service listens, `encrypted` whether by TLS; `setting` is the
        variable that said `mode`. `further` is a key that the registry does not have, and for whose
        sake none is asked for."""
        self._keys = keys
        self._mode = mode
        self._host = host
        self._loopback = is_loopback(host)
        self._setting = setting
        self._encrypted = encrypted
        self._further = further
        self._clock = clock
        self._wall = wall
        self._known: dict[bytes, tuple[bytes, Key]] = {}
        self.table = Table()
        self._some = False
        """Whether any key was ever seen; never false again."""
        self._seen_at = -math.inf
        """Begin of the last look that succeeded."""
        self._tried_at = -math.inf
        self._away = False
        self._looking: asyncio.Task[None] | None = None

    @property
    def required(self) -> bool:
        """Whether callers must show a key. Before the first look nobody knows: they must."""
        if self._mode != "auto":
            return self._mode == "required"
        return self._some or not self._loopback or self._seen_at == -math.inf

    async def start(self) -> None:
        """Looks for keys, once. Raises `ConfigError` where the service must not listen."""
        with contextlib.suppress(Unavailable):  # nobody gets in until it is there
            await asyncio.to_thread(self.look)
        self.check_start()

    def check_start(self) -> None:
        """After the first look. Raises `ConfigError`."""
        if self._mode == "off":
            if not self._loopback:
                log.warning("auth_off", host=self._host, setting=self._setting)
            return
        if self._loopback:
            return
        if self._mode == "auto" and not self._some and not self._away:
            raise ConfigError(
                f"it would listen on {self._host!r}, beyond this machine, and there is no API key: "
                f"make one with `roost key create --scope admin`, or set {self._setting}=off where "
                "something else keeps strangers out"
            )
        if not self._encrypted:
            log.warning("keys_without_tls", host=self._host)

    async def follow(self) -> None:
        """Sees what is added and revoked. Never returns."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()

    async def caller(self, authorization: bytes | None, need: Need) -> Caller:
        """Who asks with this header `Authorization`. Raises `Unauthenticated`,
        `PermissionDenied`; `Unavailable` while keys cannot be read."""
        if not self.required:
            return ANYBODY
        caller = self._identify(authorization)
        if caller is None and self._clock() - self._tried_at >= LOOK_AGAIN_S:
            await self._look()
            caller = self._identify(authorization)
        return self._checked(caller, need)

    def check(self, authorization: bytes | None, need: Need) -> Caller:
        """As `caller`, by what the last look has seen."""
        if not self.required:
            return ANYBODY
        return self._checked(self._identify(authorization), need)

    def _checked(self, caller: Caller | None, need: Need) -> Caller:
        if caller is None:
            raise _away() if self._away else Unauthenticated("this API key is not known")
        caller.check(need)
        return caller

    def _identify(self, authorization: bytes | None) -> Caller | None:
        """None for a key that is not known. Raises as `caller`, for what is no key, or not valid
        any more."""
        scheme, _, token = (authorization or b"").partition(b" ")
        parts = token.strip().split(b"_")
        if scheme.lower() != b"bearer" or len(parts) != 3 or parts[0] != PREFIX.encode():
            raise _missing()
        if self._clock() - self._seen_at > BELIEVED_S:
            raise _away()
        known = self._known.get(parts[1])
        # As long for an id that nobody has.
        same = hmac.compare_digest(
            hashlib.sha256(parts[2][: _SECRET_CHARS + 1]).digest(), known[0] if known else _NOBODY
        )
        if known is None or not same:
            return None
        key = known[1]
        state = key.state(self._wall())
        if state != "valid":
            raise Unauthenticated(
                f"this API key was {state}" if state == "revoked" else "this API key has expired"
            )
        return Caller(key.tenant, frozenset(key.scopes), key.id, confined=bool(key.tenant))

    def look(self) -> None:
        """Reads what has changed. Raises `Unavailable`, after which keys are believed for
        `BELIEVED_S`."""
        began = self._tried_at = self._clock()
        try:
            table = self._keys.look()
        except RoostError as error:
            if not self._away:
                log.warning("keys_unavailable", error=str(error), believed_s=BELIEVED_S)
            self._away = True
            raise Unavailable(str(error)) from error
        keys = [*table.keys.values(), *([self._further] if self._further else [])]
        self._known = {key.id.encode(): (bytes.fromhex(key.sha256), key) for key in keys}
        self.table = table
        self._some = self._some or table.some
        self._seen_at = began
        self._away = False

    async def _look(self) -> None:
        """One at a time, however many wait for it."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._try(), name="look for keys")
        await asyncio.shield(self._looking)

    async def _try(self) -> None:
        with contextlib.suppress(Unavailable):
            await asyncio.to_thread(self.look)


def gate_of(
    keys: Keys, config: GuardedConfig, service: str, host: str, *, further: Key | None = None
) -> Gate:
    """The gate of the service that listens on `host`, and whose settings begin with
    `ROOST_<SERVICE>_`."""
    return Gate(
        keys,
        config.auth,
        host,
        setting=f"ROOST_{service}_AUTH",
        encrypted=config.tls is not None,
        further=further,
    )


def _missing() -> Unauthenticated:
    return Unauthenticated("an API key is needed: Authorization: Bearer rk_...")


def _away() -> Unavailable:
    return Unavailable("API keys cannot be read now", retry_after_s=1)


def challenge(error: RoostError) -> str | None:
    """The header `WWW-Authenticate` that an answer with this error has, by RFC 6750."""
    if error.code == "unauthenticated":
        return 'Bearer realm="roost"'
    if error.code == "permission_denied":
        return 'Bearer realm="roost", error="insufficient_scope"'
    return None
