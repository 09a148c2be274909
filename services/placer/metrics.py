"""What the placer counts, for Prometheus. Model names appear only once they were found in the
registry; a model that is not active any more has no series."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.placer.core.changes import Held
from services.placer.core.tenancy import UNBOUNDED
from services.placer.knowledge import Knowledge
from shared.nvmetrics import Failures, family, labels_of

_TENANTS_SHOWN = 100
"""Tenants with series of their own: those that hold most. The others are one together."""
_TOGETHER = Held("_other")
"""No tenant can have this name."""
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
        self.quarantined = gauge(
            "roost_placer_quarantined_models", "Versions that are kept from all engines."
        )
        self.knowledge: Knowledge | None = None
        """Of the term; looked at when somebody scrapes, not in every cycle."""
        self.registry.register(_Known(self))
        self.failures = Failures()
        """Under Triton's names: requests that the placer answered with an error."""
        self.registry.register(self.failures)
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


class _Known(Collector):
    """By model and by worker, what the placer goes by. What is gone has no series."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        knowledge = self._metrics.knowledge
        if knowledge is not None:
            yield from _of_models(knowledge)
            yield from _of_workers(knowledge)
            yield from _of_tenants(knowledge)


def _of_models(knowledge: Knowledge) -> tuple[Metric, ...]:
    bindings = family("roost_bindings", "Workers assigned, by active model.")
    depth = family("roost_queue_requests", "Requests that wait in the model's queue, as last seen.")
    age = family(
        "roost_queue_waiting_seconds",
        "For how long something has been seen waiting in it at every look.",
    )
    # A scrape has a thread of its own: copies, since the event loop goes on meanwhile.
    for model, copies in knowledge.bindings():
        labels, active = labels_of(model), knowledge.active.get(model)
        if active is None:
            continue
        sinces = [at for at in (active.backlog_since, active.waiting_at) if at is not None]
        waits = max(knowledge.clock() - min(sinces), 0.0) if sinces else 0.0
        bindings.add_sample(bindings.name, labels, copies)
        depth.add_sample(depth.name, labels, active.depth)
        age.add_sample(age.name, labels, waits)
    return bindings, depth, age


def _of_tenants(knowledge: Knowledge) -> tuple[Metric, ...]:
    held = family("roost_placer_tenant_bytes", "What copies of its models take, on all devices.")
    quota = family("roost_placer_tenant_quota_bytes", "What they may take; none without a quota.")
    need = family(
        "roost_placer_tenant_need", "Device-seconds per second that its models are asked for."
    )
    given = family(
        "roost_placer_tenant_given", "Of that, what is planned for where there is too little."
    )
    told = sorted(knowledge.last_plan.tenants, key=lambda each: -each.device_bytes)
    rest = _TOGETHER
    for each in told[_TENANTS_SHOWN:]:
        rest = Held(
            rest.tenant,
            rest.device_bytes + each.device_bytes,
            rest.need + each.need,
            rest.given + each.given,
        )
    for each in (*told[:_TENANTS_SHOWN], *((rest,) if len(told) > _TENANTS_SHOWN else ())):
        labels = {"tenant": each.tenant}
        held.add_sample(held.name, labels, each.device_bytes)
        need.add_sample(need.name, labels, each.need)
        given.add_sample(given.name, labels, each.given)
        most = knowledge.quotas.get(each.tenant, UNBOUNDED).device_bytes
        if most is not None:
            quota.add_sample(quota.name, labels, most)
    return held, quota, need, given


def _of_workers(knowledge: Knowledge) -> tuple[Metric, ...]:
    assigned = family("roost_placer_worker_models", "Models assigned to the worker.")
    size = family("roost_placer_worker_bytes", "What its models take, by the worker's own sum.")
    limit = family("roost_placer_worker_budget_bytes", "What they may take.")
    for worker, report in list(knowledge.reports.items()):
        labels = {"worker": worker}
        models = len(knowledge.assigned.get(worker, ()))
        assigned.add_sample(assigned.name, labels, models)
        for tier, used, budget in (
            ("device", report.used_bytes, report.budget_bytes),
            ("host", report.host_used_bytes, report.host_budget_bytes),
        ):
            size.add_sample(size.name, {**labels, "tier": tier}, used)
            limit.add_sample(limit.name, {**labels, "tier": tier}, budget)
    return assigned, size, limit
