"""Answers on their way out: whole when small, else piece by piece as fast as the client reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope

from services.gateway.core.admission import Admission
from services.gateway.httpinfer import Answer

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_PIECE_BYTES: Final = 64 * 1024
"""Of an answer: as much as waits in the connection's buffer, besides."""


async def send_answer(send: Send, answer: Answer) -> None:
    await send(_head(answer))
    await send({"type": "http.response.body", "body": answer.body})


async def send_held(send: Send, answer: Answer, admission: Admission) -> None:
    """As fast as the client reads, and counts what it holds up."""
    size = len(answer.body)
    if size <= _PIECE_BYTES:
        await send_answer(send, answer)
        return
    admission.keep(size)
    try:
        await send(_head(answer))
        body = memoryview(answer.body)
        for start in range(0, size, _PIECE_BYTES):
            piece = body[start : start + _PIECE_BYTES]
            more = start + _PIECE_BYTES < size
            await send({"type": "http.response.body", "body": piece, "more_body": more})
    finally:
        admission.drop(size)


class HeldResponse(Response):
    """An answer for a handler of the router, sent as `send_held` does."""

    def __init__(self, answer: Answer, admission: Admission) -> None:
        super().__init__()
        self._answer = answer
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await send_held(send, self._answer, self._admission)


def _head(answer: Answer) -> MutableMapping[str, Any]:
    length = (b"content-length", str(len(answer.body)).encode())
    return {
        "type": "http.response.start",
        "status": answer.status,
        "headers": [*answer.headers, length],
    }
