"""Traces: OpenTelemetry behind a port so thin that a service without traces never imports it.

Off (`ROOST_TRACING` unset) `open_tracing` gives None, and every hook costs a look at that. On, the
standard `OTEL_*` variables say where spans go and how many are kept (docs/tracing.md). Exporting
has a thread of its own: what a slow or absent collector cannot take is dropped, never waited for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Literal

from shared.config import ConfigError
from shared.errors import ECHOING

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
"""W3C's headers, in HTTP and in AMQP alike."""

Kind = Literal["server", "producer", "consumer", "internal"]
Attributes = Mapping[str, str | int | float | bool]

_CLOSE_S: Final = 3.0
"""For what was not exported yet, at the end; a collector that does not answer costs no more."""
_NS: Final = 1_000_000_000

_current: ContextVar[Span | None] = ContextVar("roost_span", default=None)


class Span:
    """One span under way. Nothing here raises; after `end` nothing changes it."""

    __slots__ = ("_ended", "_span")

    def __init__(self, span: OtelSpan) -> None:
        self._span = span
        self._ended = False

    @property
    def recording(self) -> bool:
        """Whether anybody will see it: else details need not be made."""
        return not self._ended and self._span.is_recording()

    def set(self, attributes: Attributes) -> None:
        if not self._ended:
            self._span.set_attributes(attributes)

    def fail(self, code: str, message: str = "") -> None:
        """It ended with an error; `code` is one of `shared.errors`. A message that may quote the
        request is left out."""
        from opentelemetry.trace import Status, StatusCode

        if not self._ended:
            self._span.set_attribute("error.type", code)
            self._span.set_status(
                Status(StatusCode.ERROR, None if code in ECHOING else message or None)
            )

    def end(self, at: float | None = None) -> None:
        """`at` is Unix time in seconds; now by default. A second end does nothing."""
        if not self._ended:
            self._ended = True
            self._span.end(_ns(at))

    def headers(self) -> dict[str, str]:
        """What makes who reads it continue this trace."""
        carrier: dict[str, str] = {}
        _propagator().inject(carrier, context=_context(self._span))
        return carrier

    def link(self) -> Any:
        """For the `links` of another span."""
        from opentelemetry.trace import Link

        return Link(self._span.get_span_context())

    def context(self) -> Context:
        """For children."""
        return _context(self._span)


class Tracing:
    """Begins spans."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("roost")

    def begin(
        self,
        name: str,
        kind: Kind,
        parent: Span | Mapping[str, object] | None,
        attributes: Attributes,
        *,
        at: float | None = None,
        links: Sequence[Span] = (),
    ) -> Span:
        """A span below `parent`: another one, or a message's headers. Where those name no trace,
        or are malformed, it begins a new one. `at` is Unix time in seconds; now by default."""
        from opentelemetry.context import Context

        if isinstance(parent, Span):
            context = parent.context()
        elif parent:
            context = _propagator().extract(_texts(parent), context=Context())
        else:
            context = Context()
        return Span(
            self._tracer.start_span(
                name,
                context,
                _kind(kind),
                attributes,
                links=[each.link() for each in links],
                start_time=_ns(at),
            )
        )

    def close(self) -> None:
        """Sends what is left, and waits a little for that. For the end of a service."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


def current() -> Span | None:
    """The span of the request that this task serves."""
    return _current.get()


@contextlib.contextmanager
def serving(span: Span) -> Iterator[Span]:
    """`span` is `current` inside the block, and ends with it."""
    token = _current.set(span)
    try:
        yield span
    finally:
        _current.reset(token)
        span.end()


def open_tracing(*, on: bool, service: str, instance: str) -> Tracing | None:
    """None unless `on`. Raises `ConfigError` when OpenTelemetry is not installed, or when a
    variable asks for an exporter that there is not."""
    if not on:
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"ROOST_TRACING: pip install 'roost[tracing]' ({error})") from error

    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    own = {"service.instance.id": instance}
    resource = Resource.create(own if named else own | {"service.name": f"roost-{service}"})
    # The sampler is the SDK's to read: OTEL_TRACES_SAMPLER, by default what the parent says.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = _exporter(os.environ.get("OTEL_TRACES_EXPORTER", "otlp"))
    if exporter is not None:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def _exporter(name: str) -> SpanExporter | None:
    if name == "none":
        return None
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER={name!r}: otlp, console or none is expected")
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(variable, "")
        if protocol not in {"", "http/protobuf"}:
            raise ConfigError(f"{variable}={protocol!r}: only http/protobuf is there")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(f"ROOST_TRACING: pip install 'roost[tracing]' ({error})") from error
    return OTLPSpanExporter()


def _texts(headers: Mapping[str, object]) -> dict[str, str]:
    """Of a message's headers those that concern traces, if they are text."""
    told = ((key, headers.get(key)) for key in (TRACEPARENT, TRACESTATE))
    return {key: value for key, value in told if isinstance(value, str)}


def _ns(at: float | None) -> int | None:
    return None if at is None else int(at * _NS)


def _context(span: OtelSpan) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span, Context())


@functools.cache
def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


@functools.cache
def _kind(kind: Kind) -> Any:
    from opentelemetry.trace import SpanKind

    return SpanKind[kind.upper()]
