"""What the placer tells over HTTP: its health, and why everything is where it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.placer.explain import explain, fleet
from services.placer.lease import Lease
from services.placer.metrics import Metrics
from services.placer.scale import Scale
from services.placer.term import Term
from shared.auth import Gate, Need, challenge
from shared.broker.port import Broker
from shared.catalog import Catalog
from shared.errors import STATUS, InvalidRequest, RoostError, Unavailable
from shared.http.metrics import metrics_page
from shared.logs import bound
from shared.names import check_name

Handler = Callable[[Request], Awaitable[Response]]

_DIGITS = 7


class PlacerHttp:
    """The ASGI application is `app`; `term` is set while this placer holds the lease."""

    def __init__(
        self,
        broker: Broker,
        lease: Lease,
        catalog: Catalog,
        scale: Scale,
        metrics: Metrics,
        gate: Gate,
        metrics_need: Need,
    ) -> None:
        self.term: Term | None = None
        self._broker = broker
        self._lease = lease
        self._catalog = catalog
        self._scale = scale
        self._gate = gate

        told = metrics_page(metrics.registry)
        self.app = Starlette(
            routes=[
                self._route("GET", "/healthz", "open", self._healthz),
                self._route("GET", "/readyz", "open", self._readyz),
                self._route("GET", "/fleet", "admin", self._fleet),
                self._route("GET", "/fleet/workers-wanted", "admin", self._workers_wanted),
                self._route("POST", "/fleet/shrink", "admin", self._shrink),
                self._route("POST DELETE", "/fleet/workers/{worker}/drain", "admin", self._drain),
                self._route("GET", "/explain/{name}", "admin", self._explain),
                self._route("GET", "/explain/{name}/{version}", "admin", self._explain),
                self._route("GET", "/metrics", metrics_need, told),
            ],
            exception_handlers={RoostError: _refuse},
        )

    def _route(self, methods: str, path: str, need: Need, handler: Handler) -> Route:
        """Each says what it asks of its callers."""

        async def endpoint(request: Request) -> Response:
            if need == "open":
                return await handler(request)
            shown = dict(request.scope["headers"]).get(b"authorization")
            caller = await self._gate.caller(shown, need)
            if not caller.key:
                return await handler(request)
            with bound(api_key=caller.key):  # who changed what
                return await handler(request)

        return Route(path, endpoint, methods=methods.split())

    async def _healthz(self, _request: Request) -> Response:
        return _json({"status": "alive"})

    async def _readyz(self, _request: Request) -> Response:
        """Ready to decide, or to stand by for the one who does."""
        missing = []
        if not self._broker.connected:
            missing.append("the message broker")
        if not self._lease.known:
            missing.append("the store")
        role = "leader" if self.term is not None else "stand-by"
        if missing:
            return _json({"status": f"waits for {' and '.join(missing)}", "role": role}, 503)
        return _json({"status": "ready", "role": role})

    async def _fleet(self, _request: Request) -> Response:
        return _json(fleet(self._led().knowledge, self._scale.wanted, self._lease.fence))

    async def _workers_wanted(self, _request: Request) -> Response:
        term, wanted = self._led(), self._scale.wanted
        knowledge, ending = term.knowledge, term.ending()
        if not self._scale.known:
            raise Unavailable("not all workers have had the time to report yet")
        return _json(
            {
                "workers_wanted": wanted.workers,
                "workers": sorted(knowledge.reports.keys() - knowledge.leaving),
                "leaving": sorted(knowledge.leaving - ending),
                "ending": sorted(ending),
                "reasons": list(wanted.reasons),
            }
        )

    async def _drain(self, request: Request) -> Response:
        """POST: the worker is to leave. DELETE: it stays after all."""
        _refuse_pages(request)
        term, worker = self._led(), request.path_params["worker"]
        leaves = request.method == "POST"
        await (term.drain(worker) if leaves else term.undrain(worker))
        assigned = term.knowledge.assigned.get(worker, {})
        answer = {"worker": worker, "leaving": leaves, "assigned": sorted(assigned)}
        return _json(answer, 202 if leaves else 200)

    async def _shrink(self, request: Request) -> Response:
        """One worker fewer; `?to=N`: unless N or fewer would stay already, so that it may be
        asked again when the answer was lost."""
        _refuse_pages(request)
        to = request.query_params.get("to")
        if to is not None and not (to.isascii() and to.isdigit() and len(to) < _DIGITS):
            raise InvalidRequest("to must be a number of workers")
        term = self._led()
        chosen = await term.shrink(None if to is None else int(to))
        if chosen is None:
            return _json({"worker": None, "why": "no more are to leave"})
        return _json({"worker": chosen.worker, "why": chosen.why}, 202)

    async def _explain(self, request: Request) -> Response:
        term = self._led()
        name = check_name(request.path_params["name"])
        version = request.path_params.get("version")
        if version is None:
            manifest = await self._catalog.get(name)
        else:
            manifest = await self._catalog.named(name, version)
        held = (await self._catalog.quarantined()).get(manifest.id)
        return _json(explain(term.knowledge, manifest, held))

    def _led(self) -> Term:
        if self.term is None:
            raise Unavailable("this placer stands by; another one decides")
        return self.term


def _refuse_pages(request: Request) -> None:
    """A page in somebody's browser may send requests here, but not without telling its origin."""
    if "origin" in request.headers:
        raise InvalidRequest("browsers' pages may not change the fleet")


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RoostError)
    answer = _json({"error": error.message}, STATUS.get(error.code, 500))
    challenged = challenge(error)
    if challenged is not None:
        answer.headers["www-authenticate"] = challenged
    return answer


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
