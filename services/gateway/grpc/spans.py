"""The server's span of an inference call, by OpenTelemetry's conventions for RPC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from services.gateway.body import ClientGone
from services.gateway.grpc.statuses import status_of
from services.gateway.spans import carried, trace_of
from shared.errors import RoostError
from shared.tracing import Span, Tracing, serving

_ATTRIBUTES: Final = {
    "rpc.system": "grpc",
    "rpc.service": "inference.GRPCInferenceService",
    "rpc.method": "ModelInfer",
}
_OURS: Final = frozenset(("UNKNOWN", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE"))
"""Statuses that are errors of the server's, as the conventions have it."""


@contextlib.contextmanager
def serving_call(tracing: Tracing, metadata: dict[bytes, bytes]) -> Iterator[Span]:
    """Continues the client's trace. What is refused is told here, what is answered by `told`."""
    parent = carried(*trace_of(metadata))
    span = tracing.begin("inference.GRPCInferenceService/ModelInfer", "server", parent, _ATTRIBUTES)
    with serving(span):
        try:
            yield span
        except RoostError as error:
            told(span, error.code, error.message)
            raise
        except ClientGone:
            span.fail("client_closed", "the client hung up")
            raise


def told(span: Span, code: str, message: str = "") -> None:
    """What the client gets."""
    status = status_of(code)
    span.set({"rpc.grpc.status_code": status.value[0], "roost.code": code})
    if status.name in _OURS:
        span.fail(code, message)
