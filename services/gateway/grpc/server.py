"""The gRPC server: its settings, its begin and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import grpc
import grpc.aio
import structlog

from services.gateway.config import GatewayConfig
from shared.tls import HANDSHAKE_TIMEOUT_S, Identity

log = structlog.get_logger(__name__)

MAX_CONNECTIONS: Final = 8192
MAX_CALLS: Final = 4096
"""As many as HTTP takes; a health watcher is one."""
CALLS_PER_CONNECTION: Final = 1024
"""More wait at the client. As many as one model may have under way by default."""
KEEPALIVE_S: Final = 60
KEEPALIVE_TIMEOUT_S: Final = 20
"""A peer that vanished while it has calls is found after both."""
CONNECTION_AGE_S: Final = 600
"""Then a client is asked to connect anew, which it does unseen: so gateways that came later get
their share, and a connection that takes no answers does not stay for ever."""
IDLE_S: Final = 120
"""A connection without calls is closed, which its client does not see: it connects anew. Else
whoever opened all that there may be, and said nothing, would keep others out."""
METADATA_BYTES: Final = 16 * 1024
"""Of a call, names and values: gRPC's own hard limit, said so that it stays. Beyond it the call is
refused unread."""
PING_INTERVAL_MS: Final = 200
"""Clients that ping more often are sent away. Triton's name no least interval; a second is what
impatient ones use, and a ping costs next to nothing."""


def options(config: GatewayConfig) -> list[tuple[str, int]]:
    """Of `grpc.aio.server`."""
    most = max(config.request_limit_bytes, config.load_limit_bytes)
    return [
        # A port that another process has is an error, not a port to share.
        ("grpc.so_reuseport", 0),
        # As it travels; what it unpacks to is measured in `reading.py`, which gRPC cannot in time.
        ("grpc.max_receive_message_length", most),
        ("grpc.per_message_decompression", 0),
        # Answers are as large as the broker's messages may be.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", CALLS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS),
        ("grpc.max_connection_age_ms", CONNECTION_AGE_S * 1000),
        ("grpc.max_connection_idle_ms", round(IDLE_S * 1000)),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_TIMEOUT_S * 1000)),
        ("grpc.max_connection_age_grace_ms", round((config.max_timeout_s + 30) * 1000)),
    ]


class GrpcServer:
    """Serves on its own port, on the running event loop."""

    def __init__(self, config: GatewayConfig, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._config = config
        self._server = grpc.aio.server(options=options(config), maximum_concurrent_rpcs=MAX_CALLS)
        self._server.add_generic_rpc_handlers(tuple(handlers))

    async def start(self) -> int:
        """Takes calls. Returns the port. Raises `OSError` if it cannot listen, `TlsError` for
        files that cannot be used."""
        host, port = self._config.host, self._config.grpc_port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._config.tls is None:
                bound: int = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(
                    address, _credentials(Identity(self._config.tls))
                )
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {address}: {error}") from None
        await self._server.start()
        return bound

    async def serve(self, stop: asyncio.Event, grace_s: float) -> None:
        """Serves until `stop` is set; then takes no more calls, lets those under way end for
        `grace_s`, cancels the rest and returns. Cancelled itself, it drops everything at once."""
        grace: float | None = None
        try:
            await stop.wait()
            grace = grace_s
        finally:
            await self._server.stop(grace)


def _credentials(identity: Identity) -> grpc.ServerCredentials:
    """Asked anew for each connection, so that a renewed certificate is shown from the next on."""

    def now() -> grpc.ServerCertificateConfiguration:
        pem = identity.pem
        return grpc.ssl_server_certificate_configuration(((pem.key, pem.chain),), pem.client_ca)

    return grpc.dynamic_ssl_server_credentials(
        now(),
        lambda: now() if identity.renew() else None,  # in a thread of gRPC's
        require_client_authentication=identity.pem.client_ca is not None,
    )
