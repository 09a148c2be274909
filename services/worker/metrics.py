"""What a worker counts, for Prometheus. One registry per worker: several live in one process
when Roost runs embedded."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.worker.confinement.plan import Measure
from services.worker.core.events import Item
from services.worker.nvmetrics import MachineMetrics
from shared.control import ModelReport
from shared.names import ModelId
from shared.nvmetrics import Inferences, labels_of, reason_of

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


_KEPT_S: Final = 300.0
"""Series of a model that has left stay for so long: its last requests must be scraped."""


class Waiting(NamedTuple):
    """What waits for a batch of one model."""

    requests: int
    since: float
    """Monotonic: when the oldest arrived."""


class Metrics:
    """Counted on the event loop, read by the thread that answers a scrape."""

    def __init__(self, worker: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry = CollectorRegistry()
        self.inferences = Inferences()
        self.hung_up: Callable[[str | None], bool] = lambda _: False
        """Whether the client of the request with this correlation id has hung up."""
        self._clock = clock
        self._gone: dict[ModelId, float] = {}
        """When each model left, of those that still have series."""
        self._children: dict[tuple[ModelId, str], Counter] = {}
        self._models = _Models(clock)
        registry.register(self._models)
        registry.register(self.inferences)
        self.machine = MachineMetrics()
        registry.register(self.machine)
        info = Gauge("roost_worker_info", "Who this is.", ["worker"], registry=registry)
        info.labels(worker).set(1)
        self._confinement = Gauge(
            "roost_worker_confinement",
            "1 for each measure that keeps the engine's programs in, 0 for one not granted.",
            ["measure"],
            registry=registry,
        )
        self.requests = Counter(
            "roost_worker_requests_total",
            "Requests answered, by model, version and code.",
            ["model", "version", "code"],
            registry=registry,
        )
        self.late = Counter(
            "roost_worker_late_replies_total",
            "Replies sent after the request's deadline.",
            registry=registry,
        )
        self.reply_failures = Counter(
            "roost_worker_reply_failures_total",
            "Replies that did not arrive, by reason.",
            ["reason"],
            registry=registry,
        )
        self._taken = Histogram(
            "roost_worker_message_requests",
            "Requests in each message taken from a model's queue.",
            registry=registry,
            buckets=_ROWS,
        )
        self._replied = Histogram(
            "roost_worker_reply_requests",
            "Requests answered in each message to a reply queue.",
            registry=registry,
            buckets=_ROWS,
        )
        self.given_back = Counter(
            "roost_worker_given_back_total",
            "Messages returned to their queues.",
            registry=registry,
        )
        self.batch_rows = Histogram(
            "roost_worker_batch_rows", "Rows per batch.", registry=registry, buckets=_ROWS
        )
        self.queue_seconds = Histogram(
            "roost_worker_queue_seconds",
            "From the worker's receipt of a request until its batch began.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.compute_seconds = Histogram(
            "roost_worker_compute_seconds",
            "Device seconds per batch.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.loads = Counter(
            "roost_worker_loads_total", "Loads, by result.", ["result"], registry=registry
        )
        self.load_seconds = Histogram(
            "roost_worker_load_seconds",
            "Seconds per load, by where the weights came from and went to. From the host to the "
            "device it is a swap.",
            ["source", "tier"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.evictions = Counter(
            "roost_worker_evictions_total",
            "Models evicted, by the tier that they left.",
            ["tier"],
            registry=registry,
        )
        self.engine_restarts = Counter(
            "roost_worker_engine_restarts_total", "Engines lost.", registry=registry
        )
        self.budget_bytes = Gauge(
            "roost_worker_device_budget_bytes", "What models may take.", registry=registry
        )
        self.used_bytes = Gauge(
            "roost_worker_device_used_bytes", "What they take, by our sum.", registry=registry
        )
        self.measured_bytes = Gauge(
            "roost_worker_device_measured_bytes",
            "What they take, as the device tells.",
            registry=registry,
        )
        self.difference_bytes = Gauge(
            "roost_worker_device_difference_bytes",
            "Measured less sum: what our accounting misses.",
            registry=registry,
        )
        self.spare_bytes = Gauge(
            "roost_worker_device_spare_bytes",
            "What the engine has reserved for models and holds nothing now; not in the measured.",
            registry=registry,
        )
        self.shared_bytes = Gauge(
            "roost_worker_shared_bytes",
            "What would be taken more if models shared no tensors, by tier.",
            ["tier"],
            registry=registry,
        )
        self.host_budget_bytes = Gauge(
            "roost_worker_host_budget_bytes",
            "What copies of weights may take of the host's memory.",
            registry=registry,
        )
        self.host_used_bytes = Gauge(
            "roost_worker_host_used_bytes", "What they take, by our sum.", registry=registry
        )
        self.host_measured_bytes = Gauge(
            "roost_worker_host_measured_bytes",
            "What they take, as the engine tells.",
            registry=registry,
        )
        self.held_bytes = Gauge(
            "roost_worker_held_bytes", "Bytes of requests not settled.", registry=registry
        )
        self.models = Gauge(
            "roost_worker_models",
            "Models by the fastest tier that they are in; what is on disk only is not counted.",
            ["tier"],
            registry=registry,
        )
        self.models_ready = Gauge(
            "roost_worker_models_ready", "Models on the device.", registry=registry
        )

    def taken(self, requests: int) -> None:
        """A message with so many requests came."""
        self._taken.observe(requests)

    def replied(self, requests: int) -> None:
        """So many are answered in one message."""
        self._replied.observe(requests)

    def answered(
        self, item: Item, *, queue_s: float, compute_s: float, now: float, late: bool
    ) -> None:
        """A request ran, and its answer is about to be sent."""
        self._count(item.model, "ok", late=late)
        self.inferences.succeeded(
            item.model,
            item.rows,
            request_s=now - item.arrived,
            queue_s=queue_s,
            infer_s=compute_s,
        )

    def refused(self, model: ModelId, code: str, correlation_id: str | None, *, late: bool) -> None:
        """A request ended with an error."""
        self._count(model, code, late=late)
        reason = "CANCELED" if self.hung_up(correlation_id) else reason_of(code)
        self.inferences.failed(model, reason)

    def _count(self, model: ModelId, code: str, *, late: bool) -> None:
        child = self._children.get((model, code))
        if child is None:
            # Looking a child up by its labels costs more than counting.
            child = self.requests.labels(*model.split("/"), code)
            self._children[model, code] = child
        child.inc()
        if late:
            self.late.inc()

    def gone(self, model: ModelId) -> None:
        """The worker has nothing to do with it any more: in some minutes its series go."""
        self._gone[model] = self._clock()

    def seen(self, models: tuple[ModelReport, ...], waiting: Mapping[ModelId, Waiting]) -> None:
        """What there is now, as the report tells it."""
        self._models.reports, self._models.waiting = models, waiting
        self.inferences.pending = {model: each.requests for model, each in waiting.items()}
        if self._gone:
            self._drop({report.model for report in models})

    def _drop(self, here: Container[ModelId]) -> None:
        """Series of models that left and did not come back."""
        before = self._clock() - _KEPT_S
        back = [model for model in self._gone if model in here]
        old = [model for model, at in self._gone.items() if at <= before and model not in here]
        for model in (*back, *old):
            del self._gone[model]
        for key in [key for key in self._children if key[0] in old]:
            del self._children[key]
            self.requests.remove(*key[0].split("/"), key[1])
        self.inferences.forget(old)

    def confinement(self, measures: Iterable[Measure]) -> None:
        """Of the engine that has started."""
        self._confinement.clear()
        for measure in measures:
            self._confinement.labels(measure.name).set(measure.held)

    def device(self, budget: int, used: int, measured: int) -> None:
        self.budget_bytes.set(budget)
        self.used_bytes.set(used)
        self.measured_bytes.set(measured)
        self.difference_bytes.set(measured - used)


class _Models(Collector):
    """Gauges by model, made when somebody scrapes: a model that left has none."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.reports: tuple[ModelReport, ...] = ()
        self.waiting: Mapping[ModelId, Waiting] = {}
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        reports, waiting, now = self.reports, self.waiting, self._clock()
        of = ("model", "version")
        held = GaugeMetricFamily(
            "roost_worker_held_requests", "Requests taken and not settled.", labels=of
        )
        count = GaugeMetricFamily(
            "roost_worker_waiting_requests", "Of these, those that wait for a batch.", labels=of
        )
        age = GaugeMetricFamily(
            "roost_worker_oldest_request_seconds",
            "Since the oldest of those arrived at this worker; 0 when none waits.",
            labels=of,
        )
        size = GaugeMetricFamily(
            "roost_worker_model_bytes",
            "Bytes of the weights, by the fastest tier that they are in.",
            labels=(*of, "tier"),
        )
        busy = Metric(
            "roost_worker_model_busy_seconds", "Device seconds spent on the model.", "counter"
        )
        for report in reports:
            labels = labels_of(report.model)
            waits = waiting.get(report.model)
            for family, value in (
                (held, report.held),
                (count, waits.requests if waits else 0),
                (age, max(now - waits.since, 0.0) if waits else 0.0),
            ):
                family.add_sample(family.name, labels, value)
            size.add_sample(
                size.name, {**labels, "tier": report.tier}, report.footprint.weights_bytes
            )
            busy.add_sample(f"{busy.name}_total", labels, report.busy_s)
        yield from (held, count, age, size, busy)
