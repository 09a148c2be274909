"""What one tenant may take of a fleet, and how tenants are named."""

from __future__ import annotations

import math
import re
from typing import Final

import msgspec

from shared.errors import InvalidRequest

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one tenant may take. None: no bound. Bounds on requests hold at each gateway for
    itself; those on devices hold in the whole fleet."""

    requests_per_s: float | None = None
    """Over a second: a token bucket that holds one second's worth, and at least one request."""
    concurrency: int | None = None
    """Requests between admission and answer; the gateway's `tenant_inflight_limit` where None."""
    request_bytes: int | None = None
    """Bodies of its requests held in a gateway's memory."""
    device_bytes: int | None = None
    """Weights and workspace that copies of its models may take on all devices together."""
    share: float = 1.0
    """Its part of device time, relative to the other tenants', where there is too little for
    all. What one leaves unused goes to the others."""

    def __post_init__(self) -> None:
        rate = self.requests_per_s
        if rate is not None and not 0 < rate < math.inf:
            raise InvalidRequest("requests_per_s must be a finite number above 0")
        for name in ("concurrency", "request_bytes", "device_bytes"):
            bound = getattr(self, name)
            if bound is not None and not 0 < bound < 2**63:
                raise InvalidRequest(f"{name} must be a whole number above 0")
        if not 0.001 <= self.share <= 1000:
            raise InvalidRequest("share must be from 0.001 to 1000")


UNBOUNDED: Final = Quota()


def check_tenant(name: str) -> str:
    """Returns `name`, or raises `InvalidRequest`: 1 to 64 of letters, digits, `.`, `_` and `-`,
    beginning with a letter or digit."""
    if not _NAME.match(name) or ".." in name:
        raise InvalidRequest(
            f"{name[:40]!r} is not a tenant's name: 1 to 64 of A-Z a-z 0-9 . _ -, "
            "beginning with a letter or digit, without '..'"
        )
    return name
