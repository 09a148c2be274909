"""The gateway's spans, by OpenTelemetry's conventions for HTTP and messaging (docs/tracing.md)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Final

import msgspec

from services.gateway.body import ClientGone
from services.gateway.rpc import Call
from shared.broker.port import HeaderValue, Message
from shared.errors import STATUS, RoostError
from shared.models import Manifest
from shared.names import HEADER_BATCH, HEADER_COMPUTE_US, HEADER_QUEUE_US, INFER_EXCHANGE
from shared.tracing import TRACEPARENT, TRACESTATE, Span, Tracing, current, serving

_SHOWN_CHARS: Final = 128
"""Of a client's text: as much as a model's name has at most."""


_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")
_TRACESTATE: Final = re.compile(r"[ -~]{1,512}\Z")


def trace_of(headers: dict[bytes, bytes]) -> tuple[str | None, str | None]:
    """W3C's `traceparent` and `tracestate` of ASGI's headers; None for what cannot be one."""
    parent = headers.get(b"traceparent", b"").decode("latin-1")
    if not _TRACEPARENT.match(parent):
        return None, None
    state = headers.get(b"tracestate", b"").decode("latin-1")
    return parent, state if _TRACESTATE.match(state) else None


def carried(traceparent: str | None, tracestate: str | None) -> dict[str, HeaderValue]:
    """The headers of a message that belongs to this trace, whoever makes spans of it."""
    if traceparent is None:
        return {}
    if tracestate is None:
        return {TRACEPARENT: traceparent}
    return {TRACEPARENT: traceparent, TRACESTATE: tracestate}


@contextlib.contextmanager
def serving_http(
    tracing: Tracing, name: str, version: str | None, headers: dict[bytes, bytes]
) -> Iterator[Span]:
    """The server's span of one inference request over HTTP; continues the client's trace."""
    of_version = "" if version is None else "/versions/{version}"
    route = f"/v2/models/{{model}}{of_version}/infer"
    attributes = {
        "http.request.method": "POST",
        "http.route": route,
        "url.scheme": "http",
        "url.path": route.format(model=name[:_SHOWN_CHARS], version=(version or "")[:_SHOWN_CHARS]),
    }
    parent = carried(*trace_of(headers))
    span = tracing.begin(f"POST {route}", "server", parent, attributes)
    with serving(span):
        try:
            yield span
        except RoostError as error:
            told(span, STATUS.get(error.code, 500), error.code, error.message)
            raise
        except ClientGone:
            span.fail("client_closed", "the client hung up")
            raise


def told(span: Span, status: int, code: str, message: str = "") -> None:
    """What the client gets. A refusal that is its own fault is no error of the server's."""
    span.set({"http.response.status_code": status, "roost.code": code})
    if status >= 500:
        span.fail(code, message)


@contextlib.contextmanager
def publishing(tracing: Tracing, call: Call, manifest: Manifest) -> Iterator[Call]:
    """The span of the publishing, below the one that is served; it ends when the broker has the
    message, and at the block's end in any case. Gives the call that carries it on."""
    span = tracing.begin(
        f"send {INFER_EXCHANGE}",
        "producer",
        current() or call.headers,  # a job has no span of its own, but may have a trace
        {
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": INFER_EXCHANGE,
            "messaging.rabbitmq.destination.routing_key": call.routing_key,
            "messaging.message.conversation_id": call.correlation_id,
            "messaging.message.body.size": len(call.body),
            "roost.model.name": manifest.name,
            "roost.model.version": manifest.version,
        },
    )
    headers: dict[str, HeaderValue] = {**call.headers, **span.headers()}
    try:
        yield msgspec.structs.replace(call, headers=headers, on_published=span.end)
    except RoostError as error:
        span.fail(error.code, error.message)
        raise
    finally:
        span.end()


def answered(reply: Message, manifest: Manifest) -> None:
    """Tells the span that is served what the reply says of its way through worker and device."""
    span = current()
    if span is None or not span.recording:
        return
    attributes: dict[str, str | int | float | bool] = {
        "roost.model.name": manifest.name,
        "roost.model.version": manifest.version,
    }
    for header, name, unit in (
        (HEADER_QUEUE_US, "roost.queue.seconds", 1e6),
        (HEADER_COMPUTE_US, "roost.compute.seconds", 1e6),
        (HEADER_BATCH, "roost.batch.rows", 1),
    ):
        value = reply.headers.get(header)
        if isinstance(value, int):
            attributes[name] = value / unit if unit != 1 else value
    span.set(attributes)
