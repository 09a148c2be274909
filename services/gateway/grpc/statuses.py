"""How an error goes back over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final, NoReturn

import grpc
import grpc.aio

from services.gateway.body import SlowBody
from services.gateway.grpc.context import Context
from shared.names import HEADER_CODE

STATUS: Final = {
    "ok": grpc.StatusCode.OK,
    "invalid_argument": grpc.StatusCode.INVALID_ARGUMENT,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "permission_denied": grpc.StatusCode.PERMISSION_DENIED,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "already_exists": grpc.StatusCode.ALREADY_EXISTS,
    "conflict": grpc.StatusCode.ABORTED,
    "idempotency_key_reused": grpc.StatusCode.ALREADY_EXISTS,
    "too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,  # as gRPC itself says it
    "resource_exhausted": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "internal": grpc.StatusCode.INTERNAL,
    "model_failed": grpc.StatusCode.INTERNAL,
    "quarantined": grpc.StatusCode.FAILED_PRECONDITION,  # UNAVAILABLE would be tried again
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
    SlowBody.code: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status by error code."""
_PUSHBACK: Final = "grpc-retry-pushback-ms"
"""gRPC's own word to clients that try again by themselves (gRFC A6); below 0: do not."""
_MESSAGE_BYTES: Final = 2000
"""Each may take three in the trailing metadata, of which clients take 8 KiB."""


def status_of(code: str) -> grpc.StatusCode:
    """Also of a code that a worker of another release knows."""
    return STATUS.get(code, grpc.StatusCode.INTERNAL)


async def refuse(
    context: Context,
    code: str,
    message: str,
    retry_after_s: float | None = None,
) -> NoReturn:
    """Ends the call with an error. What it raises is for gRPC alone."""
    trailing = [(HEADER_CODE, code)]
    if retry_after_s is None and code == "resource_exhausted":
        retry_after_s = 1.0
    if retry_after_s is not None:
        trailing.append((_PUSHBACK, str(round(retry_after_s * 1000))))
    elif code == "too_large":
        trailing.append((_PUSHBACK, "-1"))
    shown = message.encode(errors="replace")[:_MESSAGE_BYTES].decode(errors="ignore")
    with contextlib.suppress(grpc.aio.InternalError):  # the call has ended meanwhile
        await context.abort(status_of(code), shown, tuple(trailing))
    raise asyncio.CancelledError
