"""The HTTP edge: paths to calls, results and errors to responses. Nothing is decided here.

Inference, where every microsecond counts, is dispatched by hand; the rest goes through
Starlette's router. Whatever goes wrong is answered as `{"error": "…"}`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import unquote

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router

from services.gateway.body import ClientGone, Receive, SlowBody, stream_body
from services.gateway.config import GatewayConfig
from services.gateway.infer import Answer, Inference
from services.gateway.registry import Registry, decode_registration
from services.gateway.rpc import Rpc
from services.gateway.status import Status
from shared.blobs import check_digest
from shared.errors import STATUS, InvalidRequest, RoostError, TooLarge, Unavailable
from shared.logs import bound
from shared.names import HEADER_CODE, check_name, check_version
from shared.v2 import error_body

log = structlog.get_logger(__name__)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Scope = MutableMapping[str, Any]
Handler = Callable[[Request], Awaitable[Response]]

_JSON: Final = (b"content-type", b"application/json")
_CODE: Final = HEADER_CODE.encode()
"""Also told over HTTP: two codes share a status here and there."""
_HTTP_ONLY: Final = {SlowBody.code: 408}
_CONTROL_BODY_BYTES: Final = 1024 * 1024
"""JSON of the control routes: a model's description, a filter."""
_SHOWN_CHARS: Final = 200
"""Of a client's text, in a log line."""
_encode: Final = msgspec.json.Encoder().encode


class Gateway:
    """The ASGI application."""

    def __init__(
        self,
        config: GatewayConfig,
        inference: Inference,
        status: Status,
        registry: Registry,
        rpc: Rpc,
        metrics_route: BaseRoute,
    ) -> None:
        self._inference = inference
        self._new_id = rpc.new_id
        control = Control(config, status, registry, rpc)
        self._router = Router(routes=[*control.routes(), metrics_route], redirect_slashes=False)

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
                answer = await self._inference.answer(
                    name, version, headers, receive, correlation_id
                )
                await _send(sending, answer)
            else:
                await _send(sending, Answer(405, error_body("Method Not Allowed"), [_JSON]))
        except ClientGone:
            return
        except RoostError as error:
            await _send_error(sending, error, started=started)
        except Exception:
            path = scope["path"][:_SHOWN_CHARS]
            log.exception("request_failed", method=scope["method"], path=path)
            fault = Answer(500, error_body("internal error; the gateway's log has it"), [_JSON])
            if not started:
                await _send(sending, fault)

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
            await _send(
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


async def _send(send: Send, answer: Answer) -> None:
    length = (b"content-length", str(len(answer.body)).encode())
    await send(
        {
            "type": "http.response.start",
            "status": answer.status,
            "headers": [*answer.headers, length],
        }
    )
    await send({"type": "http.response.body", "body": answer.body})


async def _send_error(send: Send, error: RoostError, *, started: bool) -> None:
    status = _HTTP_ONLY.get(error.code) or STATUS.get(error.code, 500)
    if status == 500:  # the others are counted: in an outage a line each would be a flood
        log.warning("request_failed", code=error.code, error=error.message)
    if started:
        return  # too late to say so: the connection's end tells the client
    headers = [_JSON, (_CODE, error.code.encode())]
    if error.retry_after_s is not None or status == 429:
        seconds = max(round(error.retry_after_s or 1), 1)
        headers.append((b"retry-after", str(seconds).encode()))
    if isinstance(error, SlowBody):
        headers.append((b"connection", b"close"))
    await _send(send, Answer(status, error_body(error.message), headers))


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


class Control:
    """Everything but inference: health, models, the repository."""

    def __init__(self, config: GatewayConfig, status: Status, registry: Registry, rpc: Rpc) -> None:
        self._config = config
        self._status = status
        self._registry = registry
        self._rpc = rpc

    def routes(self) -> list[BaseRoute]:
        model, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        stored = "/v2/repository/models/{name}"
        table: list[tuple[str, str, Handler]] = [
            ("GET", "/v2/health/live", self.live),
            ("GET", "/v2/health/ready", self.ready),
            ("GET", "/v2", self.server),
            ("GET", model, self.metadata),
            ("GET", version, self.metadata),
            ("GET", f"{model}/config", self.configuration),
            ("GET", f"{version}/config", self.configuration),
            ("GET", f"{model}/ready", self.model_ready),
            ("GET", f"{version}/ready", self.model_ready),
            ("GET POST", "/v2/repository/index", self.index),
            ("HEAD", "/v2/repository/blobs/{digest}", self.find_blob),
            ("PUT", "/v2/repository/blobs/{digest}", self._counted(self.put_blob)),
            ("GET", stored, self.detail),
            ("DELETE", stored, self.remove),
            ("POST", f"{stored}/versions", self._counted(self.register)),
            ("PUT", f"{stored}/versions/{{version}}", self._counted(self.register)),
            ("DELETE", f"{stored}/versions/{{version}}", self.remove),
        ]
        paths: dict[str, dict[str, Handler]] = {}
        for methods, path, handler in table:
            for method in methods.split():
                paths.setdefault(path, {})[method] = handler
        return [_route(path, handlers) for path, handlers in paths.items()]

    # --- health and metadata

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        """Only the way to the workers counts: models come and go without it turning."""
        if self._rpc.ready:
            return _json({"ready": True})
        raise Unavailable("the message broker is not connected")

    async def server(self, _: Request) -> Response:
        return _json(self._status.server())

    async def metadata(self, request: Request) -> Response:
        return _json(await self._status.metadata(*_model(request)))

    async def configuration(self, request: Request) -> Response:
        return _json(await self._status.configuration(*_model(request)))

    async def model_ready(self, request: Request) -> Response:
        name, version = _model(request)
        ready, where = await self._status.readiness(name, version)
        if ready:
            return _json({"name": name, "ready": True})
        return _json({"name": name, "ready": False, "error": where}, 503)

    # --- the repository

    async def index(self, request: Request) -> Response:
        wanted = _IndexFilter()
        body = await self._body(request) if request.method == "POST" else b""
        if body.strip():
            try:
                wanted = _index_filters.decode(body)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"the filter is not valid: {str(error)[:200]}") from None
        return _json(await self._status.index(ready_only=wanted.ready))

    async def detail(self, request: Request) -> Response:
        return _json(await self._status.detail(_model(request)[0]))

    async def find_blob(self, request: Request) -> Response:
        digest = check_digest(request.path_params["digest"])
        size = await self._registry.blob_size(digest)
        return Response(status_code=404 if size is None else 200, headers=_blob(digest, size))

    async def put_blob(self, request: Request) -> Response:
        digest = check_digest(request.path_params["digest"])
        limit = self._config.upload_limit_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise TooLarge(f"the upload has {int(declared)} bytes, the limit is {limit}")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise InvalidRequest("an upload takes no Content-Encoding: its digest is of the file")
        size = await self._registry.blob_size(digest)
        if size is not None:
            # The server reads the rest of the body and drops it.
            return _json({"digest": digest, "size_bytes": size})
        pieces = stream_body(
            request.receive, limit_bytes=limit, timeout_s=self._config.body_timeout_s
        )
        size = await self._registry.upload(digest, pieces)
        return _json({"digest": digest, "size_bytes": size}, 201)

    async def register(self, request: Request) -> Response:
        name, version = _model(request)
        registration = decode_registration(await self._body(request))
        return _json(await self._registry.register(name, version, registration), 201)

    async def remove(self, request: Request) -> Response:
        await self._registry.remove(*_model(request))
        return Response(status_code=204)

    def _counted(self, handler: Handler) -> Handler:
        async def counted(request: Request) -> Response:
            with self._registry.counted():
                return await handler(request)

        return counted

    async def _body(self, request: Request) -> bytes:
        pieces = stream_body(
            request.receive,
            limit_bytes=_CONTROL_BODY_BYTES,
            timeout_s=self._config.body_timeout_s,
        )
        return b"".join([piece async for piece in pieces])


class _IndexFilter(msgspec.Struct):
    ready: bool = False


_index_filters: Final = msgspec.json.Decoder(_IndexFilter)


def _route(path: str, handlers: dict[str, Handler]) -> Route:
    async def endpoint(request: Request) -> Response:
        # Starlette adds HEAD to GET by itself.
        return await handlers.get(request.method, handlers.get("GET", _not_allowed))(request)

    return Route(path, endpoint, methods=list(handlers))


async def _not_allowed(_: Request) -> Response:
    raise HTTPException(405)


def _model(request: Request) -> tuple[str, int | None]:
    """Name and version in the path, checked. Raises `InvalidRequest`."""
    version = request.path_params.get("version")
    name = check_name(request.path_params["name"])
    return name, None if version is None else check_version(version)


def _json(data: Any, status: int = 200) -> Response:
    return Response(_encode(data), status, media_type="application/json")


def _blob(digest: str, size: int | None) -> dict[str, str]:
    return {} if size is None else {"roost-blob-size": str(size), "roost-blob-digest": digest}
