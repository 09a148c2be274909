"""What the gateway counts, for Prometheus.

Labels are bounded: a model's name appears only after the model was found in the registry; what
asks for anything else is counted under the empty name.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """One gateway's counters in a registry of their own: several gateways may share a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "roost_gateway_requests",
            "Inference requests answered, by model and by error code (or ok, client_closed).",
            ("model", "code"),
            registry=self.registry,
        )
        self._latency = Histogram(
            "roost_gateway_request_seconds",
            "Seconds from a request's headers to its answer, answered ones only.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
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
        self.cancelled = Counter(
            "roost_gateway_cancelled",
            "Requests of clients that hung up, of which the workers were told.",
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
        self._request_children: dict[tuple[str, str], Counter] = {}
        self._latency_children: dict[str, Histogram] = {}

    def answered(self, model: str, code: str, seconds: float) -> None:
        """One inference request ended. `model` is empty unless it is registered."""
        key = (model, code)
        child = self._request_children.get(key)
        if child is None:
            child = self._request_children[key] = self._requests.labels(model, code)
        child.inc()
        if code == "ok":
            latency = self._latency_children.get(model)
            if latency is None:
                latency = self._latency_children[model] = self._latency.labels(model)
            latency.observe(seconds)

    def stray(self, kind: str) -> None:
        self._stray.labels(kind).inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def uploaded(self, nbytes: int) -> None:
        self._uploads.inc(nbytes)

    def registered(self, code: str) -> None:
        """An upload or a registration ended."""
        self._registrations.labels(code).inc()

    def forget(self, model: str) -> None:
        """The model was removed: its series go too."""
        for key in [key for key in self._request_children if key[0] == model]:
            del self._request_children[key]
            self._requests.remove(*key)
        if self._latency_children.pop(model, None) is not None:
            self._latency.remove(model)
