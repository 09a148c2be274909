"""Tables of routes: each says what it asks of its callers, and nothing is served that does not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from services.gateway.callers import Callers, asked_by
from shared.auth import Need
from shared.logs import bound

Handler = Callable[[Request], Awaitable[Response]]
Row = tuple[str, str, Need, Handler]
"""Methods, path, what a caller must show, handler."""


def routes_of(table: Iterable[Row], callers: Callers) -> list[BaseRoute]:
    """One route for each path."""
    paths: dict[str, dict[str, tuple[Need, Handler]]] = {}
    for methods, path, need, handler in table:
        for method in methods.split():
            paths.setdefault(path, {})[method] = (need, handler)
    return [_route(path, handlers, callers) for path, handlers in paths.items()]


def _route(path: str, handlers: dict[str, tuple[Need, Handler]], callers: Callers) -> Route:
    async def endpoint(request: Request) -> Response:
        # Starlette adds HEAD to GET by itself.
        found = handlers.get(request.method) or handlers.get("GET")
        if found is None:
            raise HTTPException(405)
        need, handler = found
        caller = await callers.admit(dict(request.scope["headers"]), need)
        with asked_by(caller):
            if not caller.key:
                return await handler(request)
            with bound(api_key=caller.key):  # who changed what
                return await handler(request)

    return Route(path, endpoint, methods=list(handlers))
