"""Every route but inference: health, metadata, statistics, the repository, aliases."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from services.gateway import openapi
from services.gateway.aliases import AliasAdmin, decode_wish, parse_revision, parse_wait
from services.gateway.body import Held, stream_body
from services.gateway.callers import Callers, asking
from services.gateway.config import GatewayConfig
from services.gateway.core.admission import Admission
from services.gateway.lifecycle import Lifecycle
from services.gateway.metrics import Metrics
from services.gateway.overrides import check_unload, decode_load
from services.gateway.registry import Registry, decode_registration
from services.gateway.routes import Routes
from services.gateway.rpc import Rpc
from services.gateway.statistics import Statistics
from services.gateway.status import VERSION, Status
from services.gateway.table import Handler, Row
from shared.blobs import check_digest
from shared.errors import InvalidRequest, TooLarge, Unavailable
from shared.http.metrics import metrics_page
from shared.names import check_name, check_version

_BODY_BYTES: Final = 1024 * 1024
"""JSON: a model's description, a filter."""
_PAGE_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"
}
_encode: Final = msgspec.json.Encoder().encode


class Control:
    """Everything but inference: health, models, the repository."""

    def __init__(
        self,
        config: GatewayConfig,
        routes: Routes,
        status: Status,
        statistics: Statistics,
        registry: Registry,
        lifecycle: Lifecycle,
        aliases: AliasAdmin,
        admission: Admission,
        rpc: Rpc,
        callers: Callers,
    ) -> None:
        self._config = config
        self._routes = routes
        self._status = status
        self._statistics = statistics
        self._registry = registry
        self._lifecycle = lifecycle
        self._aliases = aliases
        self._admission = admission
        self._rpc = rpc
        self._callers = callers

    def table(self) -> list[Row]:
        model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        stored = "/v2/repository/models/{model}"
        return [
            ("GET", "/v2/health/live", "open", self.live),
            ("GET", "/v2/health/ready", "open", self.ready),
            ("GET", "/v2", "read", self.server),
            ("GET", "/openapi.json", "open", self.openapi),
            ("GET", "/docs", "open", self.page),
            ("GET", "/v2/models/stats", "read", self.all_statistics),  # before a model of that name
            ("GET", model, "read", self.metadata),
            ("GET", version, "read", self.metadata),
            ("GET", f"{model}/config", "read", self.configuration),
            ("GET", f"{version}/config", "read", self.configuration),
            ("GET", f"{model}/ready", "read", self.model_ready),
            ("GET", f"{version}/ready", "read", self.model_ready),
            ("GET", f"{model}/stats", "read", self.statistics),
            ("GET", f"{version}/stats", "read", self.statistics),
            ("GET POST", "/v2/repository/index", "read", self.index),
            ("POST", f"{stored}/load", "push", self.load),
            ("POST", f"{stored}/unload", "push", self.unload),
            ("GET", "/v2/repository/quarantine", "admin", self.quarantined),
            ("DELETE", f"{stored}/quarantine", "admin", self.release),
            ("DELETE", f"{stored}/versions/{{version}}/quarantine", "admin", self.release),
            ("HEAD", "/v2/repository/blobs/{digest}", "push", self.find_blob),
            ("PUT", "/v2/repository/blobs/{digest}", "push", self._counted(self.put_blob)),
            ("GET", stored, "read", self.detail),
            ("DELETE", stored, "push", self.remove),
            ("POST", f"{stored}/versions", "push", self._counted(self.register)),
            ("PUT", f"{stored}/versions/{{version}}", "push", self._counted(self.register)),
            ("DELETE", f"{stored}/versions/{{version}}", "push", self.remove),
            ("GET", f"{stored}/aliases", "read", self.list_aliases),
            ("GET", f"{stored}/aliases/{{alias}}", "read", self.find_alias),
            ("PUT", f"{stored}/aliases/{{alias}}", "push", self.put_alias),
            ("DELETE", f"{stored}/aliases/{{alias}}", "push", self.remove_alias),
        ]

    # --- health and metadata

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        """Only the way to the workers counts: models come and go without it turning."""
        if self._rpc.inviting:
            return _json({"ready": True})
        if self._rpc.ready:
            raise Unavailable("the gateway is stopping")
        raise Unavailable("the message broker is not connected")

    async def server(self, _: Request) -> Response:
        return _json(self._status.server())

    async def openapi(self, _: Request) -> Response:
        return Response(openapi.document(VERSION), media_type="application/json")

    async def page(self, _: Request) -> Response:
        return Response(openapi.page(), media_type="text/html", headers=_PAGE_HEADERS)

    async def metadata(self, request: Request) -> Response:
        return _json(await self._status.metadata(*await self._addressed(request)))

    async def configuration(self, request: Request) -> Response:
        return _json(await self._status.configuration(*await self._addressed(request)))

    async def model_ready(self, request: Request) -> Response:
        name, version = await self._addressed(request)
        ready, where = await self._status.readiness(name, version)
        if ready:
            return _json({"name": name, "ready": True})
        return _json({"name": name, "ready": False, "error": where}, 503)

    async def statistics(self, request: Request) -> Response:
        name, version = _address(request)
        versions = None if version is None else await self._routes.versions(name, version)
        return _json(await self._statistics.of(name, versions))

    async def all_statistics(self, _: Request) -> Response:
        return _json(await self._statistics.of_all())

    # --- the repository

    async def load(self, request: Request) -> Response:
        name, _ = _model(request)
        held = Held(self._admission, asking().tenant)
        try:
            body = await self._body(request, self._config.load_limit_bytes, held)
            # Tens of megabytes of base64 would hold up everybody else.
            loading = await asyncio.to_thread(decode_load, body)
            await self._lifecycle.load(name, loading)
        finally:
            held.release()
        return _json({})

    async def unload(self, request: Request) -> Response:
        name, _ = _model(request)
        check_unload(await self._body(request))
        await self._lifecycle.unload(name)
        return _json({})

    async def quarantined(self, _: Request) -> Response:
        return _json({"quarantined": await self._lifecycle.quarantined()})

    async def release(self, request: Request) -> Response:
        """Takes a model, or one version of it, out of quarantine."""
        return _json({"released": await self._lifecycle.release(*_model(request))})

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
        name, _ = _model(request)
        detail = await self._status.detail(name)
        _, aliases = await self._aliases.tell(name)
        return _json({**detail, "aliases": aliases})

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
        tenant = await self._callers.check_change(name, new=True)
        return _json(await self._registry.register(name, version, registration, tenant), 201)

    async def remove(self, request: Request) -> Response:
        name, version = _model(request)
        await self._callers.check_change(name)
        await self._registry.remove(name, version)
        return Response(status_code=204)

    # --- aliases

    async def list_aliases(self, request: Request) -> Response:
        name, _ = _model(request)
        revision, aliases = await self._aliases.tell(name)
        return _json({"model": name, "aliases": aliases}, headers=_etag(revision))

    async def find_alias(self, request: Request) -> Response:
        name, _ = _model(request)
        revision, told = await self._aliases.tell_one(name, request.path_params["alias"])
        return _json(told, headers=_etag(revision))

    async def put_alias(self, request: Request) -> Response:
        """202 while it is pending."""
        (name, _), alias = _model(request), request.path_params["alias"]
        revision = parse_revision(request.headers.get("if-match"))
        wait_s = parse_wait(request.query_params.get("wait"))
        wish = decode_wish(await self._body(request))
        document = await self._aliases.put(name, alias, wish, revision, wait_s)
        told = await self._aliases.describe(name, alias, document)
        status = 200 if told["pending"] is None else 202
        return _json(told, status, headers=_etag(document.revision))

    async def remove_alias(self, request: Request) -> Response:
        name, _ = _model(request)
        revision = parse_revision(request.headers.get("if-match"))
        await self._aliases.remove(name, request.path_params["alias"], revision)
        return Response(status_code=204)

    # --- parts

    async def _addressed(self, request: Request) -> tuple[str, int | None]:
        """Name and version in the path, where an alias may stand for it. Raises `InvalidRequest`,
        `ModelNotFound`."""
        name, version = _address(request)
        return name, await self._routes.version(name, version)

    def _counted(self, handler: Handler) -> Handler:
        async def counted(request: Request) -> Response:
            with self._registry.counted():
                return await handler(request)

        return counted

    async def _body(
        self, request: Request, limit_bytes: int = _BODY_BYTES, held: Held | None = None
    ) -> bytes:
        pieces = stream_body(
            request.receive,
            limit_bytes=limit_bytes,
            timeout_s=self._config.body_timeout_s,
        )
        read = []
        async for piece in pieces:
            if held is not None:
                held.grow(len(piece))
            read.append(piece)
        return b"".join(read)


def metrics_row(config: GatewayConfig, metrics: Metrics) -> Row:
    """`GET /metrics`, as Prometheus or OpenMetrics text, whichever is asked for."""
    return "GET", "/metrics", config.metrics_need, metrics_page(metrics.registry)


class _IndexFilter(msgspec.Struct):
    ready: bool = False


_index_filters: Final = msgspec.json.Decoder(_IndexFilter)


def _address(request: Request) -> tuple[str, str | None]:
    """Name, checked, and version in the path. Raises `InvalidRequest`."""
    return check_name(request.path_params["model"]), request.path_params.get("version")


def _model(request: Request) -> tuple[str, int | None]:
    """Name and version in the path, checked. Raises `InvalidRequest`."""
    name, version = _address(request)
    return name, None if version is None else check_version(version)


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(data), status, headers, media_type="application/json")


def _etag(revision: int) -> dict[str, str]:
    return {"etag": f'"{revision}"'}


def _blob(digest: str, size: int | None) -> dict[str, str]:
    return {} if size is None else {"roost-blob-size": str(size), "roost-blob-digest": digest}
