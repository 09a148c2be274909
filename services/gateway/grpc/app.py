"""gRPC, put together: what it needs of the gateway's parts."""

from __future__ import annotations

import asyncio

from services.gateway.callers import Callers
from services.gateway.config import GatewayConfig
from services.gateway.core.admission import Admission
from services.gateway.grpc.health import HealthService
from services.gateway.grpc.infer import GrpcInference
from services.gateway.grpc.server import GrpcServer
from services.gateway.grpc.service import InferenceService
from services.gateway.infer import Inference
from services.gateway.lifecycle import Lifecycle
from services.gateway.metrics import Metrics
from services.gateway.routes import Routes
from services.gateway.rpc import Rpc
from services.gateway.statistics import Statistics
from services.gateway.status import Status
from shared.tracing import Tracing


def open_server(
    config: GatewayConfig,
    inference: Inference,
    routes: Routes,
    status: Status,
    statistics: Statistics,
    lifecycle: Lifecycle,
    admission: Admission,
    rpc: Rpc,
    metrics: Metrics,
    tracing: Tracing | None,
    stop: asyncio.Event,
    callers: Callers,
) -> GrpcServer:
    """The server over these parts, not started. `stop` ends those who watch its health."""
    service = InferenceService(
        config,
        GrpcInference(config, inference, admission, metrics, tracing),
        routes,
        status,
        statistics,
        lifecycle,
        admission,
        rpc,
        callers,
    )
    return GrpcServer(config, [service.handler(), HealthService(config, rpc, stop).handler()])
