"""One inference request as a protocol brings it: HTTP, gRPC and jobs differ only in this."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import msgspec

from services.gateway.body import Held
from shared import v2
from shared.errors import InvalidRequest
from shared.models import Manifest

_TENANT_BYTES: Final = 128


class Read(msgspec.Struct, frozen=True, kw_only=True):
    """What was read of a request: within every limit, not yet held against its model."""

    request: v2.InferRequest
    body: bytes
    """The same as v2 bytes, which is what travels to the worker."""
    header_length: int | None
    """Bytes of JSON before the raw tensors; None: all of the body is JSON."""
    remaining_s: float | None = None
    """Until the deadline that its headers name; None when they name none."""
    level: int = 0
    """Its priority, as the protocol counts, when it names none itself; 0: the model's default."""
    traceparent: str | None = None
    """Of W3C's trace context, checked."""
    tracestate: str | None = None
    """What belongs to it, likewise."""

    def wished_s(self, elapsed_s: float = 0.0) -> list[float]:
        """Seconds until each deadline that it asks for: what its headers leave now, and the
        time-out in its body, which counts from its beginning `elapsed_s` ago."""
        wished = [] if self.remaining_s is None else [self.remaining_s]
        timeout_us = v2.timeout_us(self.request.parameters)
        if timeout_us is not None:
            wished.append(timeout_us / 1e6 - elapsed_s)
        return wished


class Asked(Protocol):
    """A request that is about to be answered."""

    name: str
    version: str | None
    """As it stands in the address, unchecked: a number, `latest` or an alias; None: whatever the
    model's name leads to."""
    split_key: str
    """Requests with the same one get the same version of a split; empty: by chance."""
    correlation_id: str
    """Of `Rpc.new_id`."""
    tenant: str
    """Whose quota it counts against; empty: nobody's."""

    async def read(self, manifest: Manifest, held: Held) -> Read:
        """The request itself; its bytes are counted in `held`. Called once, after the model was
        found. Raises `RoostError` for what is wrong with it, and `ClientGone`."""

    def watched(self) -> AbstractAsyncContextManager[None]:
        """Interrupts the body of its block with `ClientGone` when the client goes away."""


class Tenants:
    """Who asks, as the configured header or metadata of a request tells it."""

    def __init__(self, header: str) -> None:
        """Empty: there are no tenants."""
        self._key = header.strip().lower().encode()

    def of(self, headers: Mapping[bytes, bytes]) -> str:
        """Empty for nobody in particular. Keys are lower case. Raises `InvalidRequest`."""
        told = headers.get(self._key, b"") if self._key else b""
        if len(told) > _TENANT_BYTES:
            raise InvalidRequest(f"the tenant's name is longer than {_TENANT_BYTES} bytes")
        return told.decode("latin-1")
