"""Who may enter: bounds on requests in flight per model and on bytes held in all.

Invariants (`validate`): the counters are never negative, and a model with nothing in flight
has no entry, so idle registered models cost nothing here.

`now` is a monotonic clock in seconds.
"""

from __future__ import annotations

import math

import msgspec

DRAIN_HORIZON_S = 10.0
"""Time constant of the drain rate: long enough to see several batches of a slow model, short
enough to forget a spike."""
RETRY_AFTER_MAX_S = 30


class Rejection(msgspec.Struct, frozen=True):
    """Why a request may not enter now."""

    reason: str
    """`model_full` or `bytes_full`; a metric's label."""
    message: str
    retry_after_s: int


class _Flow:
    """One model's requests in flight and how fast they leave (time-based EWMA, per second)."""

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

    def __init__(self, model_inflight_limit: int, inflight_bytes_limit: int) -> None:
        self._model_limit = model_inflight_limit
        self._bytes_limit = inflight_bytes_limit
        self._flows: dict[str, _Flow] = {}
        self.held_bytes = 0
        self.in_flight = 0

    def __repr__(self) -> str:
        return f"<Admission {self.in_flight} in flight, {self.held_bytes:,} bytes held>"

    def hold(self, nbytes: int) -> Rejection | None:
        """Takes `nbytes` of the room for bodies, or says why not (and takes nothing)."""
        if self.held_bytes + nbytes > self._bytes_limit:
            return Rejection(
                "bytes_full",
                f"the gateway holds {self.held_bytes:,} bytes of requests, "
                f"its limit is {self._bytes_limit:,}",
                1,
            )
        self.held_bytes += nbytes
        return None

    def drop(self, nbytes: int) -> None:
        """Gives back what `hold` took."""
        self.held_bytes -= nbytes

    def enter(self, model: str, now: float) -> Rejection | None:
        """One request of `model` goes into flight, unless the model has its fill."""
        flow = self._flows.get(model)
        if flow is None:
            flow = self._flows[model] = _Flow(now)
        elif flow.in_flight >= self._model_limit:
            return Rejection(
                "model_full",
                f"{flow.in_flight} requests of model {model!r} are in flight already",
                self.retry_after_s(model, now),
            )
        flow.in_flight += 1
        self.in_flight += 1
        return None

    def leave(self, model: str, now: float, *, answered: bool) -> None:
        """The request ended. Only an answered one says how fast the model drains."""
        flow = self._flows[model]
        flow.in_flight -= 1
        self.in_flight -= 1
        if flow.in_flight == 0:
            del self._flows[model]
        elif answered:
            flow.left(now)

    def retry_after_s(self, model: str, now: float) -> int:
        """Whole seconds until what is in flight now has drained at the present rate: whoever
        comes back then finds room, also when everyone else who was sent away comes too."""
        flow = self._flows.get(model)
        if flow is None:
            return 1
        rate = flow.drain_per_s(now)
        # Nothing has left yet (a cold model, say): come back after as long as it has been.
        seconds = flow.in_flight / rate if rate > 0 else now - flow.since
        return min(max(math.ceil(seconds), 1), RETRY_AFTER_MAX_S)

    def validate(self) -> None:
        """Raises `AssertionError` when a law of this class is broken."""
        assert self.held_bytes >= 0, "gave back more bytes than were held"
        assert all(flow.in_flight > 0 for flow in self._flows.values()), "an idle entry"
        assert self.in_flight == sum(flow.in_flight for flow in self._flows.values())
