"""Inference over HTTP: a request's headers and body into what is asked, a reply into an answer."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager
from typing import Final

import msgspec

from services.gateway.asked import Read
from services.gateway.body import Held, Receive, read_body
from services.gateway.callers import asking
from services.gateway.config import GatewayConfig
from services.gateway.encoding import compressed, wanted_coding
from services.gateway.hangup import watching_for_hangup
from services.gateway.infer import Inference, Replied
from services.gateway.spans import serving_http, told, trace_of
from shared import v2
from shared.errors import STATUS, InvalidRequest
from shared.models import Manifest
from shared.names import (
    HEADER_BATCH,
    HEADER_CODE,
    HEADER_COMPUTE_US,
    HEADER_DEADLINE,
    HEADER_LENGTH,
    HEADER_QUEUE_US,
    HEADER_SPLIT_KEY,
)
from shared.tracing import Tracing

_LENGTH_KEY: Final = HEADER_LENGTH.lower().encode()
_DEADLINE_KEY: Final = HEADER_DEADLINE.encode()
_SPLIT_KEY: Final = HEADER_SPLIT_KEY.encode()
_TOLD: Final = tuple(
    (name, name.encode()) for name in (HEADER_QUEUE_US, HEADER_COMPUTE_US, HEADER_BATCH)
)


class Answer(msgspec.Struct, frozen=True):
    """What goes back over HTTP."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]] = []


class HttpInference:
    """The way from HTTP to `Inference` and back."""

    def __init__(
        self, config: GatewayConfig, inference: Inference, tracing: Tracing | None = None
    ) -> None:
        self._inference = inference
        self._tracing = tracing
        self.config = config
        self.limits = v2.Limits(body_bytes=config.request_limit_bytes)

    async def answer(
        self,
        name: str,
        version: str | None,
        headers: dict[bytes, bytes],
        receive: Receive,
        correlation_id: str,
    ) -> Answer:
        """The answer to one request. Raises as `Inference.answer`. `headers` are ASGI's: lower
        case, latin-1."""
        asked = HttpAsked(self, name, version, headers, receive, correlation_id)
        if self._tracing is None:
            return await self.answered(await self._inference.answer(asked), headers)
        with serving_http(self._tracing, name, version, headers) as span:
            replied = await self._inference.answer(asked)
            answer = await self.answered(replied, headers)
            told(span, answer.status, replied.code)
            return answer

    async def answered(self, replied: Replied, headers: dict[bytes, bytes]) -> Answer:
        """What a reply is over HTTP, to a request with these headers."""
        if replied.code == "ok":
            return await _encoded(_good(replied), headers)
        return _bad(replied)


class HttpAsked:
    """An `Asked` over HTTP."""

    def __init__(
        self,
        http: HttpInference,
        name: str,
        version: str | None,
        headers: dict[bytes, bytes],
        receive: Receive,
        correlation_id: str,
    ) -> None:
        self.name = name
        self.version = version
        self.split_key = headers.get(_SPLIT_KEY, b"").decode("latin-1")
        self.correlation_id = correlation_id
        self.tenant = asking().tenant
        self._http = http
        self._headers = headers
        self._receive = receive

    async def read(self, manifest: Manifest, held: Held) -> Read:
        headers, http = self._headers, self._http
        body = await read_body(
            self._receive,
            headers,
            held,
            limit_bytes=http.config.request_limit_bytes,
            timeout_s=http.config.body_timeout_s,
        )
        header_length = v2.parse_header_length(headers.get(_LENGTH_KEY))
        raw_input = v2.raw_input_of(manifest) if header_length == 0 else None
        request = v2.decode_request(body, header_length, http.limits, raw_input=raw_input)
        if header_length == 0:
            # Workers need not know of raw requests: this one gets the header that it left out.
            body, header_length = v2.encode_request(request)
        traceparent, tracestate = trace_of(headers)
        return Read(
            request=request,
            body=body,
            header_length=header_length,
            remaining_s=_remaining_s(headers),
            traceparent=traceparent,
            tracestate=tracestate,
        )

    def watched(self) -> AbstractAsyncContextManager[None]:
        return watching_for_hangup(self._receive)


def _remaining_s(headers: dict[bytes, bytes]) -> float | None:
    told = headers.get(_DEADLINE_KEY)
    if told is None:
        return None
    if not told.isdigit() or len(told) > 15:
        raise InvalidRequest(f"header {HEADER_DEADLINE} must be a Unix time in milliseconds")
    return int(told) / 1000 - time.time()


def _good(replied: Replied) -> Answer:
    told = replied.message.headers
    length = told.get(HEADER_LENGTH)
    kind = b"application/json" if length is None else b"application/octet-stream"
    headers = [(b"content-type", kind)]
    if length is not None:
        headers.append((_LENGTH_KEY, str(length).encode()))
    headers += [(key, str(told[name]).encode()) for name, key in _TOLD if name in told]
    return Answer(200, replied.message.body, headers)


def _bad(replied: Replied) -> Answer:
    headers = [
        (b"content-type", b"application/json"),
        (HEADER_CODE.encode(), replied.code.encode()),
    ]
    if replied.retry_after_s is not None:
        headers.append((b"retry-after", str(replied.retry_after_s).encode()))
    return Answer(STATUS[replied.code], replied.message.body, headers)


async def _encoded(answer: Answer, headers: dict[bytes, bytes]) -> Answer:
    """Compressed, when the client has asked for that."""
    coding = wanted_coding(headers.get(b"accept-encoding"))
    if coding is None:
        return answer
    body = await compressed(answer.body, coding)
    if body is None:
        return answer
    vary = (b"vary", b"accept-encoding")
    return Answer(200, body, [*answer.headers, (b"content-encoding", coding), vary])
