"""`GET /metrics` of the services that have this server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from shared.nvmetrics import encoder


def metrics_page(registry: CollectorRegistry) -> Callable[[Request], Awaitable[Response]]:
    """Tells them as Prometheus or OpenMetrics text, whichever is asked for."""

    async def told(request: Request) -> Response:
        encode, content_type = encoder(request.headers.get("accept", ""))
        # In a thread: thousands of models' series do not hold up the event loop.
        text = await asyncio.to_thread(encode, registry)
        return Response(text, headers={"content-type": content_type})

    return told
