"""One inference request, from its headers to its answer."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Final

import msgspec
import structlog
from structlog.contextvars import bind_contextvars

from services.gateway.body import ClientGone, Held, Receive, Rejected, read_body
from services.gateway.cancels import Cancels
from services.gateway.config import GatewayConfig
from services.gateway.core.admission import Admission
from services.gateway.core.tally import Ran
from services.gateway.encoding import compressed, wanted_coding
from services.gateway.hangup import watching_for_hangup
from services.gateway.metrics import Metrics
from services.gateway.rpc import Call, Rpc
from services.gateway.statistics import Statistics
from shared import v2
from shared.broker.port import HeaderValue, Message
from shared.catalog import Catalog
from shared.errors import STATUS, Internal, InvalidRequest, Overloaded, RoostError
from shared.models import Manifest
from shared.names import (
    HEADER_BATCH,
    HEADER_CODE,
    HEADER_COMPUTE_US,
    HEADER_DEADLINE,
    HEADER_LENGTH,
    HEADER_QUEUE_US,
    HEADER_RETRYABLE,
    check_name,
    check_version,
)

log = structlog.get_logger(__name__)

_LENGTH_KEY: Final = HEADER_LENGTH.lower().encode()
_DEADLINE_KEY: Final = HEADER_DEADLINE.encode()
_TRACEPARENT: Final = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")
_TOLD: Final = tuple(
    (name, name.encode()) for name in (HEADER_QUEUE_US, HEADER_COMPUTE_US, HEADER_BATCH)
)


_TENANT_BYTES: Final = 128


class Answer(msgspec.Struct, frozen=True):
    """What goes back over HTTP."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]] = []


class Inference:
    """Takes inference requests in. One object per gateway."""

    def __init__(
        self,
        config: GatewayConfig,
        catalog: Catalog,
        admission: Admission,
        rpc: Rpc,
        metrics: Metrics,
        statistics: Statistics,
        cancels: Cancels,
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._admission = admission
        self._rpc = rpc
        self._metrics = metrics
        self._statistics = statistics
        self._cancels = cancels
        self._tenant_key = config.tenant_header.strip().lower().encode()
        self._limits = v2.Limits(body_bytes=config.request_limit_bytes)

    async def answer(
        self,
        name: str,
        version: str | None,
        headers: dict[bytes, bytes],
        receive: Receive,
        correlation_id: str,
    ) -> Answer:
        """The answer to one request. Raises `RoostError` for every refusal, and `ClientGone`
        when there is nobody left to answer. `headers` are ASGI's: lower case, latin-1. The
        caller has bound model and request id for the log."""
        started = time.monotonic()
        model = ""  # as a metric's label: only what the registry knows
        code = "internal"
        manifest: Manifest | None = None
        ran: Ran | None = None
        held = Held(self._admission)
        try:
            # 1. Look up: the name first, so that rubbish costs no reading.
            manifest = await self._look_up(name, version)
            model = manifest.name
            # 2. Read.
            config = self._config
            body = await read_body(
                receive,
                headers,
                held,
                limit_bytes=config.request_limit_bytes,
                timeout_s=config.body_timeout_s,
            )
            # 3. Check: what cannot succeed ends here, before it costs a queue or a device.
            call, rows = self._checked(manifest, version, headers, body, started, correlation_id)
            # 4. Admit.
            tenant = self._tenant(headers)
            self._admit(model, tenant)
            # 5. Publish and await.
            answered = False
            sent = time.monotonic()
            try:
                async with watching_for_hangup(receive):
                    reply = await self._rpc.call(call)
                answered = True
            except ClientGone:
                self._cancels.add(correlation_id, call.deadline)
                raise
            finally:
                self._leave(model, tenant, answered=answered)
            # 6. Answer.
            answer, code = _answer_of(reply)
            if code == "ok":
                ran = _ran(reply, rows, time.monotonic() - sent)
                answer = await _encoded(answer, headers)
            elif reply.headers.get(HEADER_RETRYABLE):
                again_s = self._admission.retry_after_s(model, time.monotonic())
                answer.headers.append((b"retry-after", str(again_s).encode()))
            return answer
        except RoostError as error:
            code = error.code
            if isinstance(error, Overloaded):
                self._metrics.rejected(getattr(error, "reason", "queue_full"))
                if error.retry_after_s is None:
                    error.retry_after_s = self._admission.retry_after_s(model, time.monotonic())
            raise
        except ClientGone:
            code = "client_closed"
            raise
        finally:
            held.release()
            seconds = time.monotonic() - started
            self._metrics.answered(model, code, seconds)
            if manifest is not None:
                self._statistics.note(manifest.id, seconds, ran)

    async def _look_up(self, name: str, version: str | None) -> Manifest:
        wanted = None if version is None else check_version(version)
        return await self._catalog.get(check_name(name), wanted)

    def _checked(
        self,
        manifest: Manifest,
        version: str | None,
        headers: dict[bytes, bytes],
        body: bytes,
        started: float,
        correlation_id: str,
    ) -> tuple[Call, int]:
        """The call, and the rows of the request."""
        header_length = v2.parse_header_length(headers.get(_LENGTH_KEY))
        raw_input = v2.raw_input_of(manifest) if header_length == 0 else None
        request = v2.decode_request(body, header_length, self._limits, raw_input=raw_input)
        if request.id is not None:
            bind_contextvars(request_id=request.id)  # the name by which the client will ask
        rows = v2.check_inputs(request, manifest)
        if header_length == 0:
            # Workers need not know of raw requests: this one gets the header that it left out.
            body, header_length = v2.encode_request(request)
        forwarded: dict[str, HeaderValue] = {}
        trace = headers.get(b"traceparent")
        if trace is not None and _TRACEPARENT.match(trace):
            forwarded["traceparent"] = trace.decode()
        call = Call(
            correlation_id=correlation_id,
            routing_key=manifest.name if version is None else manifest.id,
            body=body,
            header_length=header_length,
            deadline=self._deadline(request, headers, started),
            priority=v2.message_priority(v2.priority(request.parameters)),
            headers=forwarded,
        )
        return call, rows

    def _deadline(
        self, request: v2.InferRequest, headers: dict[bytes, bytes], started: float
    ) -> float:
        """On the event loop's clock: the earliest of what body and headers ask for, else the
        default; never beyond the configured maximum."""
        wished: list[float] = []
        timeout_us = v2.timeout_us(request.parameters)
        if timeout_us is not None:
            wished.append(timeout_us / 1e6 - (time.monotonic() - started))
        told = headers.get(_DEADLINE_KEY)
        if told is not None:
            if not told.isdigit() or len(told) > 15:
                raise InvalidRequest(
                    f"header {HEADER_DEADLINE} must be a Unix time in milliseconds"
                )
            wished.append(int(told) / 1000 - time.time())
        remaining_s = min(*wished, self._config.max_timeout_s) if wished else None
        if remaining_s is None:
            remaining_s = self._config.default_timeout_s
        return asyncio.get_running_loop().time() + remaining_s

    def _tenant(self, headers: dict[bytes, bytes]) -> str:
        name = headers.get(self._tenant_key, b"") if self._tenant_key else b""
        if len(name) > _TENANT_BYTES:
            raise InvalidRequest(f"the tenant's name is longer than {_TENANT_BYTES} bytes")
        return name.decode("latin-1")

    def _admit(self, model: str, tenant: str) -> None:
        rejection = self._admission.enter(model, time.monotonic(), tenant)
        if rejection is not None:
            raise Rejected(rejection)
        self._metrics.in_flight.inc()

    def _leave(self, model: str, tenant: str, *, answered: bool) -> None:
        self._admission.leave(model, time.monotonic(), answered=answered, tenant=tenant)
        self._metrics.in_flight.dec()


def _ran(reply: Message, rows: int, waited_s: float) -> Ran:
    told = [reply.headers.get(name) for name in (HEADER_BATCH, HEADER_COMPUTE_US)]
    batch_rows, compute_us = (value if isinstance(value, int) else 0 for value in told)
    return Ran(rows, batch_rows, waited_s, compute_us)


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


def _answer_of(reply: Message) -> tuple[Answer, str]:
    """The worker's (or placer's) reply as HTTP, and its code."""
    told = reply.headers
    code = told.get(HEADER_CODE)
    if code == "ok":
        length = told.get(HEADER_LENGTH)
        kind = b"application/json" if length is None else b"application/octet-stream"
        headers = [(b"content-type", kind)]
        if length is not None:
            headers.append((_LENGTH_KEY, str(length).encode()))
        headers += [(key, str(told[name]).encode()) for name, key in _TOLD if name in told]
        return Answer(200, reply.body, headers), "ok"
    if not isinstance(code, str) or code not in STATUS or v2.error_message(reply.body) is None:
        log.error("malformed_reply", code=repr(code)[:60], body=repr(reply.body[:200]))
        raise Internal("the reply to this request is malformed")
    headers = [(b"content-type", b"application/json"), (HEADER_CODE.encode(), code.encode())]
    return Answer(STATUS[code], reply.body, headers), code
