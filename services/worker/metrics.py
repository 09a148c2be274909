"""What a worker counts, for Prometheus. One registry per worker: several live in one process
when Roost runs embedded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    def __init__(self, worker: str) -> None:
        self.registry = registry = CollectorRegistry()
        info = Gauge("roost_worker_info", "Who this is.", ["worker"], registry=registry)
        info.labels(worker).set(1)
        self.requests = Counter(
            "roost_worker_requests_total",
            "Requests answered, by model and code.",
            ["model", "code"],
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

    def request(self, model: str, code: str, *, late: bool) -> None:
        self.requests.labels(model, code).inc()
        if late:
            self.late.inc()

    def device(self, budget: int, used: int, measured: int) -> None:
        self.budget_bytes.set(budget)
        self.used_bytes.set(used)
        self.measured_bytes.set(measured)
        self.difference_bytes.set(measured - used)
