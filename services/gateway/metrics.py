"""What the gateway counts, for Prometheus.

Labels are bounded: a model's name appears only after the model was found in the registry; what
asks for anything else is counted under the empty name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.names import ModelId, model_id
from shared.nvmetrics import Failures, reason_of

_GIVEN_UP: Final = frozenset({"deadline_exceeded", "client_closed"})
_LATE_S: Final = 5.0
"""A worker that has a request at its deadline tells of it within this long, as a rule."""
_MOST_LOST: Final = 10_000
"""As many as the table of pending requests remembers."""
_OTHER: Final = "other"
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """One gateway's counters in a registry of their own: several gateways may share a process."""

    def __init__(self, *, late_s: float = _LATE_S) -> None:
        self.registry = CollectorRegistry()
        self._late_s = late_s
        self._requests = Counter(
            "roost_gateway_requests",
            "Inference requests answered, by model, version and error code (or ok, client_closed).",
            ("model", "version", "code"),
            registry=self.registry,
        )
        self._latency = Histogram(
            "roost_gateway_request_seconds",
            "Seconds from a request's headers to its answer, answered ones only.",
            ("model", "version"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.failures = Failures()
        """Under Triton's names: requests that no worker saw."""
        self.registry.register(self.failures)
        self._maybe_lost: dict[str, tuple[ModelId, str]] = {}
        self.in_flight = Gauge(
            "roost_gateway_in_flight_requests",
            "Inference requests between admission and answer.",
            registry=self.registry,
        )
        self.held_bytes = Gauge(
            "roost_gateway_held_bytes",
            "Bytes in memory of request bodies, and of answers being sent.",
            registry=self.registry,
        )
        self._stray = Counter(
            "roost_gateway_stray_replies",
            "Replies that nobody awaited: late, double, or unknown.",
            ("kind",),
            registry=self.registry,
        )
        self._rejected = Counter(
            "roost_gateway_rejected",
            "Requests turned away before they were published, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self._denied = Counter(
            "roost_gateway_denied",
            "Requests without an API key, or with one that is not enough, by error code.",
            ("code",),
            registry=self.registry,
        )
        self._tenant_requests = Counter(
            "roost_gateway_tenant_requests",
            "Inference requests answered, by tenant and error code (or ok, client_closed). Tenants "
            "without a key and a quota are told together, as 'other'.",
            ("tenant", "code"),
            registry=self.registry,
        )
        self._tenants: frozenset[str] = frozenset()
        self._tenant_children: dict[tuple[str, str], Counter] = {}
        self._pack_requests = Histogram(
            "roost_gateway_pack_requests",
            "Requests in each message to a model's queue.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.cancelled = Counter(
            "roost_gateway_cancelled",
            "Requests of clients that hung up, of which the workers were told.",
            registry=self.registry,
        )
        self._jobs = Counter(
            "roost_gateway_jobs",
            "Jobs accepted (queued), and ended in each state, at this gateway.",
            ("state",),
            registry=self.registry,
        )
        self.running_jobs = Gauge(
            "roost_gateway_running_jobs",
            "Jobs that have their turn at this gateway, or wait here for the next.",
            registry=self.registry,
        )
        self._uploads = Counter(
            "roost_gateway_uploaded_bytes",
            "Bytes of model files received and kept.",
            registry=self.registry,
        )
        self._registrations = Counter(
            "roost_gateway_registrations",
            "Uploads of model files and registrations of versions, by error code (or ok, "
            "client_closed).",
            ("code",),
            registry=self.registry,
        )
        # Looking a child up by its labels costs more than counting; models are few and stay.
        self._request_children: dict[tuple[str, str, str], Counter] = {}
        self._latency_children: dict[tuple[str, str], Histogram] = {}

    def answered(self, model: str, version: str, code: str, seconds: float) -> None:
        """One inference request ended. `model` and `version` are empty unless it is registered."""
        key = (model, version, code)
        child = self._request_children.get(key)
        if child is None:
            child = self._request_children[key] = self._requests.labels(*key)
        child.inc()
        if code == "ok":
            latency = self._latency_children.get(key[:2])
            if latency is None:
                latency = self._latency_children[key[:2]] = self._latency.labels(*key[:2])
            latency.observe(seconds)

    def sent(self, requests: int) -> None:
        """A message with so many requests goes to a model's queue."""
        self._pack_requests.observe(requests)

    def stray(self, kind: str, correlation_id: str | None = None) -> None:
        """A reply that nobody awaited."""
        self._stray.labels(kind).inc()
        if correlation_id is not None:
            self._maybe_lost.pop(correlation_id, None)

    def refused(self, model: ModelId, code: str) -> None:
        """A request for a registered model ended before it was sent."""
        full = code == "resource_exhausted"
        self.failures.failed(model, "REJECTED" if full else reason_of(code))

    def given_up(self, model: ModelId, code: str, correlation_id: str, deadline: float) -> None:
        """A request that may have been sent is not awaited any more. If a worker has it, the
        worker counts it under Triton's names, and its late reply says so; what nobody tells of
        by then was lost on the way, and is counted here. `deadline` is on the event loop's
        clock."""
        if code not in _GIVEN_UP or len(self._maybe_lost) >= _MOST_LOST:
            self.refused(model, code)
            return
        loop = asyncio.get_running_loop()
        self._maybe_lost[correlation_id] = (model, code)
        loop.call_at(max(deadline, loop.time()) + self._late_s, self._lost, correlation_id)

    def _lost(self, correlation_id: str) -> None:
        lost = self._maybe_lost.pop(correlation_id, None)
        if lost is not None:
            self.refused(*lost)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def denied(self, code: str) -> None:
        """Somebody was not let in."""
        self._denied.labels(code).inc()

    def of_tenant(self, tenant: str, code: str) -> None:
        """One inference request of a tenant ended. An empty one is nobody."""
        if not tenant:
            return
        key = (tenant if tenant in self._tenants else _OTHER, code)
        child = self._tenant_children.get(key)
        if child is None:
            child = self._tenant_children[key] = self._tenant_requests.labels(*key)
        child.inc()

    def name_tenants(self, tenants: Iterable[str]) -> None:
        """These have series of their own; what others had goes."""
        self._tenants = frozenset(tenants)
        kept = self._tenants | {_OTHER}
        for key in [key for key in self._tenant_children if key[0] not in kept]:
            del self._tenant_children[key]
            self._tenant_requests.remove(*key)

    def job(self, state: str) -> None:
        """A job came into this state."""
        self._jobs.labels(state).inc()

    def uploaded(self, nbytes: int) -> None:
        self._uploads.inc(nbytes)

    def registered(self, code: str) -> None:
        """An upload or a registration ended."""
        self._registrations.labels(code).inc()

    def models(self) -> set[ModelId]:
        """That have series."""
        return self.failures.models() | {
            model_id(name, int(version)) for name, version, _ in self._request_children if name
        }

    def forget(self, model: str, version: int | None = None) -> None:
        """The model was removed, or this version of it: its series go too."""
        gone = (model,) if version is None else (model, str(version))
        ids = self.failures.of_name(model)
        self.failures.forget([id_ for id_ in ids if version is None or id_ == f"{model}/{version}"])
        for key in [key for key in self._request_children if key[: len(gone)] == gone]:
            del self._request_children[key]
            self._requests.remove(*key)
        for timed in [key for key in self._latency_children if key[: len(gone)] == gone]:
            del self._latency_children[timed]
            self._latency.remove(*timed)
