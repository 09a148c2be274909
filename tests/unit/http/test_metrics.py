"""Metrics as a scraper asks for them."""

from __future__ import annotations

import httpx
from prometheus_client import CollectorRegistry, Counter
from starlette.applications import Starlette
from starlette.routing import Route

from shared.http.metrics import metrics_page


async def test_metrics_come_in_the_form_that_is_asked_for():
    """Prometheus text by default, OpenMetrics on request."""
    registry = CollectorRegistry()
    Counter("roost_things", "Things.", ["model"], registry=registry).labels("m").inc()
    app = Starlette(routes=[Route("/metrics", metrics_page(registry))])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://roost.test") as client:
        plain = await client.get("/metrics", headers={"accept": "text/plain"})
        assert 'roost_things_total{model="m"} 1.0' in plain.text
        assert plain.headers["content-type"].startswith("text/plain")
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        openmetrics = await client.get("/metrics", headers=accept)
        assert openmetrics.text.endswith("# EOF\n")
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
