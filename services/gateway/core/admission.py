"""Who may enter: bounds on requests in flight per model and per tenant, and on bytes held in all.

Invariants (`validate`): the counters are never negative, and a model or tenant with nothing in
flight has no entry, so idle registered models cost nothing here.

`now` is a monotonic clock in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from services.gateway.core.quotas import Quotas, Rejection
from shared.quotas import Quota

DRAIN_HORIZON_S = 10.0
"""Time constant of the drain rate: long enough to see several batches of a slow model, short
enough to forget a spike."""
RETRY_AFTER_MAX_S = 30


class _Flow:
    """One model's, or one tenant's, requests in flight and how fast they leave (time-based EWMA,
    per second)."""

    __slots__ = ("in_flight", "rate", "seen", "since")

    def __init__(self, now: float) -> None:
        self.in_flight = 0
        self.rate = 0.0
        self.since = now
        self.seen = now

    def left(self, now: float) -> None:
        age = max(now - self.seen, 0.0)
        self.rate = self.rate * math.exp(-age / DRAIN_HORIZON_S) + 1 / DRAIN_HORIZON_S
        self.seen = now

    def drain_per_s(self, now: float) -> float:
        """The rate now, corrected for the time before the first request was seen."""
        decayed = self.rate * math.exp(-max(now - self.seen, 0.0) / DRAIN_HORIZON_S)
        warm = 1 - math.exp(-max(now - self.since, 1e-3) / DRAIN_HORIZON_S)
        return decayed / warm


class Admission:
    """Counts what is in flight and says yes, or no with a reason and a time to come back."""

    def __init__(
        self,
        model_inflight_limit: int,
        inflight_bytes_limit: int,
        tenant_inflight_limit: int | None = None,
    ) -> None:
        self._model_limit = model_inflight_limit
        self._bytes_limit = inflight_bytes_limit
        self._tenant_limit = tenant_inflight_limit
        self._quotas = Quotas()
        self._flows: dict[str, _Flow] = {}
        self._tenants: dict[str, _Flow] = {}
        self.held_bytes = 0
        self.in_flight = 0

    def __repr__(self) -> str:
        return f"<Admission {self.in_flight} in flight, {self.held_bytes:,} bytes held>"

    def set_quotas(self, quotas: Mapping[str, Quota], now: float) -> None:
        """From now on these hold, by tenant; requests under way stay."""
        self._quotas.set(quotas, now)

    def spend(self, tenant: str, now: float) -> Rejection | None:
        """One request of the tenant arrives, unless it has asked too often. Before its body is
        read: whoever asks too often must not cost that."""
        return self._quotas.spend(tenant, now)

    def hold(self, nbytes: int, tenant: str = "") -> Rejection | None:
        """Takes `nbytes` of the room for bodies, or says why not (and takes nothing)."""
        if self.held_bytes + nbytes > self._bytes_limit:
            return Rejection(
                "bytes_full",
                f"the gateway holds {self.held_bytes:,} bytes of requests, "
                f"its limit is {self._bytes_limit:,}",
                1,
            )
        rejection = self._quotas.hold(tenant, nbytes)
        if rejection is None:
            self.held_bytes += nbytes
        return rejection

    def keep(self, nbytes: int) -> None:
        """Takes room for bytes that are there already and cannot be refused: an answer that its
        client is slow to read. While there are many, new requests find no room."""
        self.held_bytes += nbytes

    def drop(self, nbytes: int, tenant: str = "") -> None:
        """Gives back what `hold` or `keep` took."""
        self._quotas.drop(tenant, nbytes)
        self.held_bytes -= nbytes

    def enter(self, model: str, now: float, tenant: str = "") -> Rejection | None:
        """One request of `model` goes into flight, unless the model, or the tenant who asks,
        has its fill. An empty tenant is nobody and has no bound."""
        flow = self._flows.get(model)
        if flow is not None and flow.in_flight >= self._model_limit:
            return Rejection(
                "model_full",
                f"{flow.in_flight} requests of model {model!r} are in flight already",
                _drained_s(flow, now),
            )
        if tenant:
            asking = self._tenants.get(tenant)
            limit = self._quotas.of(tenant).concurrency or self._tenant_limit
            if asking is not None and limit is not None and asking.in_flight >= limit:
                return Rejection(
                    "tenant_full",
                    f"{asking.in_flight} requests of this tenant are in flight already",
                    _drained_s(asking, now),
                )
            _enter(self._tenants, tenant, now)
        _enter(self._flows, model, now)
        self.in_flight += 1
        return None

    def leave(self, model: str, now: float, *, answered: bool, tenant: str = "") -> None:
        """The request ended. Only an answered one says how fast the model drains."""
        _leave(self._flows, model, now, answered=answered)
        if tenant:
            _leave(self._tenants, tenant, now, answered=answered)
        self.in_flight -= 1

    def retry_after_s(self, model: str, now: float) -> int:
        """Whole seconds until what is in flight now has drained at the present rate: whoever
        comes back then finds room, also when everyone else who was sent away comes too."""
        flow = self._flows.get(model)
        return 1 if flow is None else _drained_s(flow, now)

    def validate(self) -> None:
        """Raises `AssertionError` when a law of this class is broken."""
        assert self.held_bytes >= 0, "gave back more bytes than were held"
        self._quotas.validate()
        for flows in (self._flows, self._tenants):
            assert all(flow.in_flight > 0 for flow in flows.values()), "an idle entry"
        assert self.in_flight == sum(flow.in_flight for flow in self._flows.values())
        assert self.in_flight >= sum(flow.in_flight for flow in self._tenants.values())


def _enter(flows: dict[str, _Flow], key: str, now: float) -> None:
    flow = flows.get(key)
    if flow is None:
        flow = flows[key] = _Flow(now)
    flow.in_flight += 1


def _leave(flows: dict[str, _Flow], key: str, now: float, *, answered: bool) -> None:
    flow = flows[key]
    flow.in_flight -= 1
    if flow.in_flight == 0:
        del flows[key]
    elif answered:
        flow.left(now)


def _drained_s(flow: _Flow, now: float) -> int:
    rate = flow.drain_per_s(now)
    # Nothing has left yet (a cold model, say): come back after as long as it has been.
    seconds = flow.in_flight / rate if rate > 0 else now - flow.since
    return min(max(math.ceil(seconds), 1), RETRY_AFTER_MAX_S)
