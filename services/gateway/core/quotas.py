"""What one tenant may take of a gateway: requests a second, requests at once, bytes of bodies.

Invariants (`validate`): what is counted is never negative, and a tenant without anything under way
has an entry only where a rate bounds it. So there are never more entries than tenants with a quota
and requests in flight.

`now` is a monotonic clock in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from shared.quotas import UNBOUNDED, Quota

_ROUNDING: Final = 1e-9


class Rejection(msgspec.Struct, frozen=True):
    """Why a request may not enter now."""

    reason: str
    """`model_full`, `bytes_full`, `tenant_full`, `tenant_rate` or `tenant_bytes`; a metric's
    label."""
    message: str
    retry_after_s: int


class Bucket:
    """A token bucket: `rate` tokens a second, and as many at once as come in a second (at least
    one)."""

    __slots__ = ("_at", "rate", "tokens")

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self.tokens = max(rate, 1.0)
        self._at = now

    def __repr__(self) -> str:
        return f"<Bucket {self.tokens:.2f} of {max(self.rate, 1.0):g}>"

    def take(self, now: float) -> float:
        """Takes a token and returns 0; or the seconds until there is one, and takes nothing."""
        self._fill(now)
        if self.tokens >= 1.0 - _ROUNDING:
            self.tokens -= 1.0
            return 0.0
        return (1.0 - self.tokens) / self.rate

    def change(self, rate: float, now: float) -> None:
        """What was saved up stays, as far as the new rate lets it."""
        self._fill(now)
        self.rate = rate
        self.tokens = min(self.tokens, max(rate, 1.0))

    def _fill(self, now: float) -> None:
        gained = max(now - self._at, 0.0) * self.rate
        self.tokens = min(self.tokens + gained, max(self.rate, 1.0))
        self._at = now


class Quotas:
    """Rates and bytes of all tenants; how many requests of theirs are under way, `Admission`
    counts. An empty tenant is nobody and has no bounds."""

    def __init__(self) -> None:
        self._quotas: Mapping[str, Quota] = {}
        self._buckets: dict[str, Bucket] = {}
        self._held: dict[str, int] = {}

    def set(self, quotas: Mapping[str, Quota], now: float) -> None:
        """From now on these hold."""
        self._quotas = quotas
        rates = {name: quota.requests_per_s for name, quota in quotas.items()}
        self._buckets = {name: b for name, b in self._buckets.items() if rates.get(name)}
        for name, rate in rates.items():
            bucket = self._buckets.get(name)
            if rate is None:
                continue
            if bucket is None:
                self._buckets[name] = Bucket(rate, now)
            elif bucket.rate != rate:
                bucket.change(rate, now)

    def of(self, tenant: str) -> Quota:
        return self._quotas.get(tenant, UNBOUNDED)

    def spend(self, tenant: str, now: float) -> Rejection | None:
        """One request of the tenant comes in, or why it must not."""
        bucket = self._buckets.get(tenant)
        wait_s = 0.0 if bucket is None else bucket.take(now)
        if bucket is None or not wait_s:
            return None
        return Rejection(
            "tenant_rate",
            f"this tenant may ask {bucket.rate:g} times a second",
            max(math.ceil(wait_s - _ROUNDING), 1),
        )

    def hold(self, tenant: str, nbytes: int) -> Rejection | None:
        """Counts bytes of the tenant's requests, or says why not (and counts nothing)."""
        if not tenant or not nbytes:
            return None
        held = self._held.get(tenant, 0)
        most = self.of(tenant).request_bytes
        if most is not None and held + nbytes > most:
            return Rejection(
                "tenant_bytes",
                f"requests of this tenant hold {held:,} bytes, its limit is {most:,}",
                1,
            )
        self._held[tenant] = held + nbytes
        return None

    def drop(self, tenant: str, nbytes: int) -> None:
        """Gives back what `hold` counted."""
        if tenant and nbytes:
            left = self._held[tenant] - nbytes
            if left:
                self._held[tenant] = left
            else:
                del self._held[tenant]

    def validate(self) -> None:
        """Raises `AssertionError` when a law of this class is broken."""
        assert all(held > 0 for held in self._held.values()), "an idle or negative entry"
        for name, bucket in self._buckets.items():
            assert bucket.rate == self.of(name).requests_per_s, "a rate of the past"
            assert -_ROUNDING <= bucket.tokens <= max(bucket.rate, 1.0), bucket
