"""gRPC's health checking protocol: `grpc.health.v1.Health`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import grpc

from services.gateway.config import GatewayConfig
from services.gateway.grpc import health_pb2 as pb
from services.gateway.grpc.context import Context
from services.gateway.grpc.reading import parsed, receive
from services.gateway.grpc.service import NAME as INFERENCE
from services.gateway.grpc.service import guarded, open_to_all
from services.gateway.rpc import Rpc
from shared.errors import ModelNotFound

_NAME: Final = "grpc.health.v1.Health"
_SERVICES: Final = ("", INFERENCE)
_BODY_BYTES: Final = 4096
_LOOK_S: Final = 1.0
"""How late a watcher hears of a change."""

Status = pb.HealthCheckResponse.ServingStatus


class HealthService:
    """Serving means that requests can be sent and answered; models come and go without it
    turning. They are not services here: `ModelReady` tells of them."""

    def __init__(self, config: GatewayConfig, rpc: Rpc, stop: asyncio.Event) -> None:
        self._config = config
        self._rpc = rpc
        self._stop = stop

    def handler(self) -> grpc.GenericRpcHandler:
        # Streams of requests, for the reason that `service.py` gives.
        return grpc.method_handlers_generic_handler(
            _NAME,
            {
                "Check": grpc.stream_unary_rpc_method_handler(
                    guarded("Check", self.check, open_to_all)
                ),
                "Watch": grpc.stream_stream_rpc_method_handler(
                    guarded("Watch", self.watch, open_to_all)
                ),
            },
        )

    async def check(self, context: Context) -> bytes:
        if await self._asked(context) not in _SERVICES:
            raise ModelNotFound("no such service: '' and " + repr(INFERENCE))
        return _encoded(self._status())

    async def watch(self, context: Context) -> None:
        """Tells the status now and whenever it is another, until the gateway stops."""
        known = await self._asked(context) in _SERVICES
        told = None
        while True:
            status = self._status() if known else Status.Value("SERVICE_UNKNOWN")
            if status != told:
                await context.write(_encoded(status))
                told = status
            if self._stop.is_set():
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _LOOK_S)

    async def _asked(self, context: Context) -> str:
        """The service's name."""
        data = await receive(context, None, _BODY_BYTES, self._config.body_timeout_s)
        name: str = parsed(pb.HealthCheckRequest, data).service
        return name

    def _status(self) -> Any:
        serving = self._rpc.inviting and not self._stop.is_set()
        return Status.Value("SERVING" if serving else "NOT_SERVING")


def _encoded(status: Any) -> bytes:
    message: bytes = pb.HealthCheckResponse(status=status).SerializeToString()
    return message
