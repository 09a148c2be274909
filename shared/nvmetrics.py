"""Inference counted under Triton's metric names and labels, for dashboards made for Triton.

The names, `reason`s and units are those of Triton 2.5x (its docs/user_guide/metrics.md): counters
without `_total`, microseconds, and durations of answered requests only. Each request is counted
once in a whole fleet, by whoever ended it (docs/adr/0021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shared.names import ModelId

Reason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]
"""Triton's: it waited too long or there was no room; its client left; the model failed; else."""
REASONS: Final[tuple[Reason, ...]] = ("REJECTED", "CANCELED", "BACKEND", "OTHER")

_BY_CODE: Final[dict[str, Reason]] = {
    "deadline_exceeded": "REJECTED",
    "client_closed": "CANCELED",
    "model_failed": "BACKEND",
    "quarantined": "BACKEND",
    "resource_exhausted": "BACKEND",  # a worker's: the device's memory
}

_COUNTERS: Final = {
    "nv_inference_request_success": "Number of successful inference requests, all batch sizes",
    "nv_inference_request_failure": "Number of failed inference requests, all batch sizes",
    "nv_inference_count": "Number of inferences performed: rows of all batches",
    "nv_inference_exec_count": "Number of model executions performed: batches",
    "nv_inference_request_duration_us": "Cumulative microseconds from receipt to answer",
    "nv_inference_queue_duration_us": "Cumulative microseconds from receipt to the batch's begin",
    "nv_inference_compute_input_duration_us": "Always 0: it is in compute_infer",
    "nv_inference_compute_infer_duration_us": "Cumulative microseconds of requests' batches",
    "nv_inference_compute_output_duration_us": "Always 0: it is in compute_infer",
    "nv_energy_consumption": "GPU energy consumption in joules since the worker started",
}


def reason_of(code: str) -> Reason:
    """Triton's reason for an error code of ours."""
    return _BY_CODE.get(code, "OTHER")


def family(name: str, text: str = "") -> Metric:
    """A family whose samples have its own name; a counter when it is one of Triton's.

    OpenMetrics knows no counter without `_total`: there these are of unknown type, which costs
    nothing but the hint. In the older text format they are counters, as Triton's (`encoder`).
    """
    known = _COUNTERS.get(name)
    return Metric(name, known or text, "gauge" if known is None else "unknown")


def encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """What writes a registry down in the format that the header asks for, and its content type."""
    try:
        encode, content_type = choose_encoder(accept)
    except Exception:  # noqa: BLE001 - it stumbles over versions that are none (0.22 to 0.25)
        encode, content_type = choose_encoder("")
    if content_type.startswith("text/plain"):
        encode = partial(_with_counters, encode)
    return encode, content_type


def _with_counters(encode: Callable[[CollectorRegistry], bytes], registry: Collector) -> bytes:
    text = encode(registry)  # type: ignore[arg-type]  # prometheus_client asks for `collect` alone
    for name in _COUNTERS:
        untyped, counter = (f"# TYPE {name} {kind}\n".encode() for kind in ("untyped", "counter"))
        text = text.replace(untyped, counter)
    return text


@dataclass(slots=True)
class _Sums:
    """Of one version of one model."""

    succeeded: int = 0
    failed: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    rows: int = 0
    batches: int = 0
    request_us: float = 0.0
    queue_us: float = 0.0
    infer_us: float = 0.0
    load_s: float = 0.0


class Failures(Collector):
    """`nv_inference_request_failure` of one instance. One thread counts, any may collect."""

    def __init__(self) -> None:
        self._sums: dict[ModelId, _Sums] = {}

    def failed(self, model: ModelId, reason: Reason) -> None:
        """One request for a registered model came to nothing."""
        self._of(model).failed[reason] += 1

    def forget(self, models: Iterable[ModelId]) -> None:
        """Their series go."""
        for model in models:
            self._sums.pop(model, None)

    def models(self) -> set[ModelId]:
        """That have series."""
        return set(self._sums)

    def of_name(self, name: str) -> list[ModelId]:
        """The versions of that model which have series."""
        return [model for model in self._sums if model.partition("/")[0] == name]

    def collect(self) -> Iterator[Metric]:
        failure = family("nv_inference_request_failure")
        for model, sums in self._sums.copy().items():
            labels = labels_of(model)
            for reason, count in sums.failed.items():
                failure.add_sample(failure.name, {**labels, "reason": reason}, count)
        yield failure

    def _of(self, model: ModelId) -> _Sums:
        sums = self._sums.get(model)
        if sums is None:
            sums = self._sums[model] = _Sums()
        return sums


class Inferences(Failures):
    """All of `nv_inference_*` that Triton has by default, of one worker."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: Mapping[ModelId, int] = {}
        """Requests that wait for a batch; of the models that are not in it, none."""

    def succeeded(
        self, model: ModelId, rows: int, *, request_s: float, queue_s: float, infer_s: float
    ) -> None:
        """One request was answered. As in Triton, each request of a batch counts all of its
        time on the device."""
        sums = self._of(model)
        sums.succeeded += 1
        sums.rows += rows
        sums.request_us += request_s * 1e6
        sums.queue_us += queue_s * 1e6
        sums.infer_us += infer_s * 1e6

    def ran(self, model: ModelId) -> None:
        """One batch."""
        self._of(model).batches += 1

    def loaded(self, model: ModelId, seconds: float) -> None:
        """From now on the model has series, zeros too."""
        self._of(model).load_s = seconds

    def collect(self) -> Iterator[Metric]:
        yield from super().collect()
        every = [(labels_of(model), model, sums) for model, sums in self._sums.copy().items()]
        values: dict[str, Callable[[_Sums], float]] = {
            "nv_inference_request_success": lambda sums: sums.succeeded,
            "nv_inference_count": lambda sums: sums.rows,
            "nv_inference_exec_count": lambda sums: sums.batches,
            "nv_inference_request_duration_us": lambda sums: int(sums.request_us),
            "nv_inference_queue_duration_us": lambda sums: int(sums.queue_us),
            "nv_inference_compute_input_duration_us": lambda _: 0,
            "nv_inference_compute_infer_duration_us": lambda sums: int(sums.infer_us),
            "nv_inference_compute_output_duration_us": lambda _: 0,
        }
        for name, value in values.items():
            counter = family(name)
            for labels, _, sums in every:
                counter.add_sample(name, labels, value(sums))
            yield counter
        pending, loads = self.pending, family(_LOAD, "Model load time in seconds")
        waiting = family(_PENDING, "Requests at the worker that wait for a batch")
        for labels, model, sums in every:
            waiting.add_sample(_PENDING, labels, pending.get(model, 0))
            if sums.load_s:
                loads.add_sample(_LOAD, labels, sums.load_s)
        yield waiting
        yield loads


_PENDING: Final = "nv_inference_pending_request_count"
_LOAD: Final = "nv_model_load_duration_secs"


def labels_of(model: ModelId) -> dict[str, str]:
    """Triton's labels, and ours."""
    name, _, version = model.partition("/")
    return {"model": name, "version": version}
