"""What the placer counts, for Prometheus. Model names appear only once they were found in the
registry; a model that is not active any more has no series."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Metrics:
    """One placer's numbers in a registry of their own: several may share a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=_SECONDS, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry)

        self.tick_seconds = histogram(
            "roost_placer_tick_seconds", "Seconds of one cycle: observe, plan, verify, apply."
        )
        self.plan_seconds = histogram("roost_placer_plan_seconds", "Seconds of the decision alone.")
        self.reflex_seconds = Histogram(
            "roost_placer_reflex_seconds",
            "Seconds from a first request's receipt (first), or from the begin of the cycle that a "
            "worker's news woke (starving), until the model's assignment was written.",
            ("kind",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.depth_questions = counter(
            "roost_placer_depth_questions", "Questions to the broker about what waits in a queue."
        )
        self.depths_put_off = gauge(
            "roost_placer_depths_put_off", "Queues to ask about that had to wait for another cycle."
        )
        self.put_off = gauge(
            "roost_placer_put_off", "Models whose turn to be planned comes at the next cycle."
        )
        self.workers_wanted = gauge("roost_workers_wanted", "Workers that the fleet should have.")
        self.workers_wanted_reason = gauge(
            "roost_workers_wanted_reason", "1 for each reason of that number.", "reason"
        )
        self.leaving = gauge("roost_placer_leaving_workers", "Workers that were asked to leave.")
        self.workers = gauge("roost_placer_workers", "Workers that report.")
        self.leading = gauge("roost_placer_leading", "1 while this placer holds the lease.")
        self.active = gauge("roost_placer_active_models", "Models that have a queue.")
        self.bindings: Callable[[], Iterable[tuple[str, int]]] = tuple
        """Workers assigned by active model; asked when somebody scrapes, not in every cycle."""
        self.registry.register(_Bindings(self))
        self.refusals = counter(
            "roost_placer_refusals", "Copies that could not be placed, by kind of reason.", "reason"
        )
        self.activations = counter("roost_placer_activations", "Models that became active.")
        self.evictions = counter("roost_placer_evictions", "Bindings that made room for others.")
        self.forwarded = counter("roost_placer_forwarded", "Unrouted requests passed on.")
        self.unknown = counter("roost_placer_unknown", "Unrouted requests for no known model.")
        self.answered = counter(
            "roost_placer_answered", "Requests answered with an error, by code.", "code"
        )
        self.malformed = counter("roost_placer_malformed", "Unrouted messages dead-lettered.")


class _Bindings(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "roost_bindings", "Workers assigned, by active model.", labels=("model",)
        )
        for model, copies in self._metrics.bindings():
            family.add_metric((model,), copies)
        yield family
