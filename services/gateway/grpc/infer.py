"""Inference over gRPC: a call into what is asked, a reply into its answer."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Final

from structlog.contextvars import bind_contextvars

from services.gateway.asked import Read
from services.gateway.body import ClientGone, Held, Rejected
from services.gateway.callers import asking
from services.gateway.config import GatewayConfig
from services.gateway.core.admission import Admission
from services.gateway.grpc import inference_pb2 as pb
from services.gateway.grpc.context import Context, metadata_of
from services.gateway.grpc.messages import infer_body, infer_response, typed_bytes
from services.gateway.grpc.reading import NoMessage, parsed, receive
from services.gateway.grpc.spans import serving_call, told
from services.gateway.grpc.statuses import refuse
from services.gateway.infer import Inference, Replied
from services.gateway.metrics import Metrics
from services.gateway.spans import trace_of
from shared import v2
from shared.errors import DeadlineExceeded, RoostError
from shared.models import Manifest
from shared.names import (
    HEADER_BATCH,
    HEADER_COMPUTE_US,
    HEADER_LENGTH,
    HEADER_QUEUE_US,
    HEADER_SPLIT_KEY,
)
from shared.tracing import Tracing

_TOLD: Final = (HEADER_QUEUE_US, HEADER_COMPUTE_US, HEADER_BATCH)
_SPLIT_KEY: Final = HEADER_SPLIT_KEY.encode()
_NESTED: Final = frozenset(
    (pb.ModelInferRequest.INPUTS_FIELD_NUMBER, pb.ModelInferRequest.OUTPUTS_FIELD_NUMBER)
)
_SMALL: Final = 64 * 1024
"""Of an answer: as much as waits in the connection's buffer, besides. As over HTTP."""
_SHOWN_CHARS: Final = 200
"""Of a client's text, in a log line."""
_LATE_S: Final = 0.005
"""A call that ends with less of its time left has run out of it: clocks differ a little."""


class GrpcInference:
    """The way from gRPC to `Inference` and back."""

    def __init__(
        self,
        config: GatewayConfig,
        inference: Inference,
        admission: Admission,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._inference = inference
        self._tracing = tracing
        self._admission = admission
        self._metrics = metrics
        self.config = config
        self.limits = v2.Limits(body_bytes=config.request_limit_bytes)

    async def answer(self, context: Context, correlation_id: str) -> bytes:
        """The serialised answer to one call. Raises as `Inference.answer`, and `NoMessage`."""
        held = Held(self._admission, asking().tenant)
        try:
            message = await self._message(context, held)
            name = message.model_name
            bind_contextvars(model=name[:_SHOWN_CHARS])
            asked = GrpcAsked(self, context, message, held, correlation_id)
            del message  # `asked` lets go of it when it was read
            replied = await self._replied(asked)
        finally:
            held.release()
        if replied.code == "ok":
            return self._good(replied, context)
        said = v2.error_message(replied.message.body) or ""
        return await refuse(context, replied.code, said, replied.retry_after_s)

    async def _replied(self, asked: GrpcAsked) -> Replied:
        if self._tracing is None:
            return await self._inference.answer(asked)
        with serving_call(self._tracing, asked.metadata) as span:
            replied = await self._inference.answer(asked)
            told(span, replied.code)
            return replied

    async def _message(self, context: Context, held: Held) -> pb.ModelInferRequest:
        """What is refused here has no model yet, and is counted without one."""
        started = time.monotonic()
        try:
            async with Watched(context):
                data = await receive(
                    context, held, self.config.request_limit_bytes, self.config.body_timeout_s
                )
            message = parsed(pb.ModelInferRequest, data, _NESTED)
            held.grow(typed_bytes(message))
            return message
        except (RoostError, ClientGone, NoMessage) as error:
            code = error.code if isinstance(error, RoostError) else "client_closed"
            if isinstance(error, Rejected):
                self._metrics.rejected(error.reason)
            self._metrics.answered("", "", code, time.monotonic() - started)
            raise

    def _good(self, replied: Replied, context: Context) -> bytes:
        headers = replied.message.headers
        length = headers.get(HEADER_LENGTH)
        answer = infer_response(replied.message.body, v2.parse_header_length(length))
        context.set_trailing_metadata(
            tuple((name, str(headers[name])) for name in _TOLD if name in headers)
        )
        if len(answer) > _SMALL:
            # Until the client has taken it, or is gone.
            size = len(answer)
            self._admission.keep(size)
            context.add_done_callback(lambda _: self._admission.drop(size))
        return answer


class GrpcAsked:
    """An `Asked` over gRPC."""

    def __init__(
        self,
        inference: GrpcInference,
        context: Context,
        message: pb.ModelInferRequest,
        received: Held,
        correlation_id: str,
    ) -> None:
        self.name = message.model_name
        self.version = message.model_version or None
        self.correlation_id = correlation_id
        self.tenant = asking().tenant
        self.metadata = metadata_of(context)
        self.split_key = self.metadata.get(_SPLIT_KEY, b"").decode("latin-1")
        self._inference = inference
        self._context = context
        self._message: pb.ModelInferRequest | None = message
        self._received = received

    async def read(self, manifest: Manifest, held: Held) -> Read:  # noqa: ARG002  of `Asked`
        message, self._message = self._message, None
        assert message is not None, "read once"
        body, header_length = infer_body(message, self._inference.limits)
        held.grow(len(body))
        del message
        self._received.release()
        request = v2.decode_request(body, header_length, self._inference.limits)
        traceparent, tracestate = trace_of(self.metadata)
        return Read(
            request=request,
            body=body,
            header_length=header_length,
            remaining_s=self._context.time_remaining(),
            traceparent=traceparent,
            tracestate=tracestate,
        )

    def watched(self) -> Watched:
        return Watched(self._context)


class Watched:
    """Turns the cancellation with which gRPC tells of a call's end into what it means: the time is
    up, or the client has gone. (The gateway itself cancels no call that can still be answered.)"""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            remaining_s = self._context.time_remaining()
            if remaining_s is not None and remaining_s <= _LATE_S:
                raise DeadlineExceeded("no answer before the call's deadline") from None
            raise ClientGone from None
