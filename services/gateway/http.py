"""The HTTP edge: paths to calls, results and errors to responses. Nothing is decided here.

Inference, where every microsecond counts, is dispatched by hand; the rest goes through
Starlette's router. Whatever goes wrong is answered as `{"error": "…"}`.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any, Final
from urllib.parse import unquote

import structlog
from starlette.exceptions import HTTPException
from starlette.routing import Router

from services.gateway.body import ClientGone, Receive, SlowBody
from services.gateway.callers import Callers, asked_by
from services.gateway.core.admission import Admission
from services.gateway.httpinfer import Answer, HttpInference
from services.gateway.rpc import Rpc
from services.gateway.sending import Send, send_answer, send_held
from services.gateway.table import Row, routes_of
from shared.auth import challenge
from shared.errors import ECHOING, STATUS, InvalidRequest, JobNotDone, RoostError
from shared.logs import bound
from shared.names import HEADER_CODE
from shared.v2 import error_body

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]

_JSON: Final = (b"content-type", b"application/json")
_CODE: Final = HEADER_CODE.encode()
"""Also told over HTTP: two codes share a status here and there."""
_HTTP_ONLY: Final = {SlowBody.code: 408, JobNotDone.code: 409}
_SHOWN_CHARS: Final = 200
"""Of a client's text, in a log line."""


class Gateway:
    """The ASGI application."""

    def __init__(
        self,
        inference: HttpInference,
        callers: Callers,
        admission: Admission,
        rpc: Rpc,
        table: Iterable[Row],
    ) -> None:
        """`table` has everything but inference."""
        self._inference = inference
        self._admission = admission
        self._new_id = rpc.new_id
        self._callers = callers
        self._router = Router(routes=routes_of(table, callers), redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _refuse_other(scope, receive, send)
            return
        target = _infer_target(scope)
        if target is None or scope["method"] != "POST":
            await self._guarded(scope, receive, send, target, "")
            return
        correlation_id = self._new_id()
        # Some 4 µs; whatever is logged until the answer has gone out says whose it is.
        with bound(model=target[0][:_SHOWN_CHARS], request_id=correlation_id):
            await self._guarded(scope, receive, send, target, correlation_id)

    async def _guarded(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        target: tuple[str, str | None] | None,
        correlation_id: str,
    ) -> None:
        started = False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if target is None:
                await self._control(scope, receive, sending)
            elif scope["method"] == "POST":
                name, version = target
                headers = dict(scope["headers"])
                with asked_by(await self._callers.admit(headers, "infer")):
                    answer = await self._inference.answer(
                        name, version, headers, receive, correlation_id
                    )
                await send_held(sending, answer, self._admission)
            else:
                await send_answer(sending, Answer(405, error_body("Method Not Allowed"), [_JSON]))
        except ClientGone:
            return
        except RoostError as error:
            await _send_error(sending, error, started=started)
        except Exception:
            path = scope["path"][:_SHOWN_CHARS]
            log.exception("request_failed", method=scope["method"], path=path)
            fault = Answer(500, error_body("internal error; the gateway's log has it"), [_JSON])
            if not started:
                await send_answer(sending, fault)

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        if b"%2f" in scope.get("raw_path", b"").lower():
            raise InvalidRequest("a segment of the path contains '/'")
        # With an "app" in its scope, the router raises what it would else answer as plain text.
        scope["app"] = self
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            allow = [
                (b"allow", v.encode()) for k, v in (error.headers or {}).items() if k == "Allow"
            ]
            await send_answer(
                send, Answer(error.status_code, error_body(str(error.detail)), [_JSON, *allow])
            )


def _infer_target(scope: Scope) -> tuple[str, str | None] | None:
    """Model and version that `…/infer` addresses, unchecked; None for any other path.

    Split before percent-decoding, so that an encoded slash cannot make a segment."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    if not raw.endswith(b"/infer") or not raw.startswith(b"/v2/models/"):
        return None
    parts = raw[len(b"/v2/models/") : -len(b"/infer")].split(b"/")
    if len(parts) == 1:
        return _text(parts[0]), None
    if len(parts) == 3 and parts[1] == b"versions":
        return _text(parts[0]), _text(parts[2])
    return None


def _text(segment: bytes) -> str:
    text = segment.decode("latin-1")
    return unquote(text) if "%" in text else text


async def _send_error(send: Send, error: RoostError, *, started: bool) -> None:
    status = _HTTP_ONLY.get(error.code) or STATUS.get(error.code, 500)
    if status == 500:  # the others are counted: in an outage a line each would be a flood
        said = "" if error.code in ECHOING else error.message
        log.warning("request_failed", code=error.code, error=said)
    if started:
        return  # too late to say so: the connection's end tells the client
    headers = [_JSON, (_CODE, error.code.encode())]
    if error.retry_after_s is not None or status == 429:
        seconds = max(round(error.retry_after_s or 1), 1)
        headers.append((b"retry-after", str(seconds).encode()))
    challenged = challenge(error)
    if challenged is not None:
        headers.append((b"www-authenticate", challenged.encode()))
    if isinstance(error, SlowBody):
        headers.append((b"connection", b"close"))
    await send_answer(send, Answer(status, error_body(error.message), headers))


async def _refuse_other(scope: Scope, receive: Receive, send: Send) -> None:
    """Web sockets are closed; there is nothing to do at the server's start and end."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
