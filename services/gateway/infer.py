"""One inference request, from its address to its reply, whatever protocol brought it."""

from __future__ import annotations

import asyncio
import time

import msgspec
import structlog
from structlog.contextvars import bind_contextvars

from services.gateway import spans
from services.gateway.asked import Asked, Read
from services.gateway.body import ClientGone, Held, Rejected
from services.gateway.cancels import Cancels
from services.gateway.config import GatewayConfig
from services.gateway.core.admission import Admission
from services.gateway.core.tally import Ran
from services.gateway.metrics import Metrics
from services.gateway.routes import Routes, Target
from services.gateway.rpc import Call, Rpc
from services.gateway.statistics import Statistics
from shared import v2
from shared.broker.port import Message
from shared.errors import STATUS, Internal, Overloaded, RoostError
from shared.models import Manifest
from shared.names import HEADER_BATCH, HEADER_CODE, HEADER_COMPUTE_US, HEADER_RETRYABLE
from shared.tracing import Tracing

log = structlog.get_logger(__name__)


class Taken(msgspec.Struct, frozen=True):
    """A request that was read and suits its model."""

    target: Target
    read: Read
    rows: int


class Replied(msgspec.Struct, frozen=True):
    """What a worker (or the placer) answered."""

    message: Message
    code: str
    """`ok`, or the error's; one of `shared.errors.STATUS`."""
    retry_after_s: int | None = None
    """When an error is worth another try: how long until there is room."""


class Inference:
    """Takes inference requests in. One object per gateway."""

    def __init__(
        self,
        config: GatewayConfig,
        routes: Routes,
        admission: Admission,
        rpc: Rpc,
        metrics: Metrics,
        statistics: Statistics,
        cancels: Cancels,
        tracing: Tracing | None = None,
    ) -> None:
        self._config = config
        self._routes = routes
        self._admission = admission
        self._rpc = rpc
        self._metrics = metrics
        self._statistics = statistics
        self._cancels = cancels
        self._tracing = tracing

    async def answer(self, asked: Asked) -> Replied:
        """The reply to one request, good or bad. Raises `RoostError` for every refusal of our
        own, and `ClientGone` when there is nobody left to answer. The caller has bound model and
        request id for the log."""
        started = time.monotonic()
        model = ""  # as a metric's label: only what the registry knows
        code = "internal"
        manifest: Manifest | None = None
        ran: Ran | None = None
        call: Call | None = None
        reply: Message | None = None
        tenant = asked.tenant
        held = Held(self._admission, tenant)
        try:
            # 1. Look up: the name first, so that rubbish costs no reading.
            target = await self._routes.target(asked.name, asked.version, asked.split_key)
            manifest = target.manifest
            model = manifest.name
            self.spend(tenant)
            # 2. Read and check: what cannot succeed ends here, before it costs a queue or a device.
            taken = await self.take(asked, target, held)
            call = self._call(asked, taken, started)
            # 3. Admit.
            self._admit(model, tenant)
            # 4. Publish and await.
            answered = False
            sent = time.monotonic()
            try:
                async with asked.watched():
                    reply = await self._ask(call, manifest)
                answered = True
            except ClientGone:
                self._cancels.add(asked.correlation_id, call.deadline)
                raise
            finally:
                self._leave(model, tenant, answered=answered)
            # 5. See what it says.
            code = code_of(reply)
            if code == "ok":
                ran = _ran(reply, taken.rows, time.monotonic() - sent)
            elif reply.headers.get(HEADER_RETRYABLE):
                return Replied(reply, code, self._retry_after_s(model))
            return Replied(reply, code)
        except RoostError as error:
            code = error.code
            if isinstance(error, Overloaded):
                self._metrics.rejected(getattr(error, "reason", "queue_full"))
                if error.retry_after_s is None:
                    error.retry_after_s = self._retry_after_s(model)
            raise
        except (ClientGone, asyncio.CancelledError):  # gRPC cancels whose client has gone
            code = "client_closed"
            raise
        finally:
            held.release()
            seconds = time.monotonic() - started
            version = "" if manifest is None else str(manifest.version)
            self._metrics.answered(model, version, code, seconds)
            self._metrics.of_tenant(tenant, code)
            if manifest is not None:
                self._statistics.note(manifest.id, seconds, ran)
                if call is None:
                    self._metrics.refused(manifest.id, code)
                elif reply is None:
                    self._metrics.given_up(manifest.id, code, asked.correlation_id, call.deadline)

    async def _ask(self, call: Call, manifest: Manifest) -> Message:
        if self._tracing is None:
            return await self._rpc.call(call)
        with spans.publishing(self._tracing, call, manifest) as traced:
            reply = await self._rpc.call(traced)
        spans.answered(reply, manifest)
        return reply

    async def take(self, asked: Asked, target: Target, held: Held) -> Taken:
        """Reads the request and holds it against its model. Raises what `Asked.read` raises, and
        `InvalidRequest` when it does not suit the model."""
        read = await asked.read(target.manifest, held)
        if read.request.id is not None:
            bind_contextvars(request_id=read.request.id)  # the name by which the client will ask
        return Taken(target, read, v2.check_inputs(read.request, target.manifest))

    def spend(self, tenant: str) -> None:
        """One request more of the tenant. Raises `Rejected`."""
        rejection = self._admission.spend(tenant, time.monotonic())
        if rejection is not None:
            raise Rejected(rejection)

    def _call(self, asked: Asked, taken: Taken, started: float) -> Call:
        read, manifest = taken.read, taken.target.manifest
        return Call(
            correlation_id=asked.correlation_id,
            routing_key=taken.target.routing_key,
            body=read.body,
            header_length=read.header_length,
            deadline=self._deadline(read, started),
            priority=v2.message_priority(v2.priority(read.request.parameters) or read.level),
            headers=spans.carried(read.traceparent, read.tracestate),
            pack=manifest.max_batch_size if self._config.packing and not manifest.stateful else 1,
        )

    def _deadline(self, read: Read, started: float) -> float:
        """On the event loop's clock: the earliest of what body and headers ask for, else the
        default; never beyond the configured maximum."""
        config, wished = self._config, read.wished_s(time.monotonic() - started)
        remaining_s = min(wished, default=config.default_timeout_s)
        return asyncio.get_running_loop().time() + min(remaining_s, config.max_timeout_s)

    def _retry_after_s(self, model: str) -> int:
        return self._admission.retry_after_s(model, time.monotonic())

    def _admit(self, model: str, tenant: str) -> None:
        rejection = self._admission.enter(model, time.monotonic(), tenant)
        if rejection is not None:
            raise Rejected(rejection)
        self._metrics.in_flight.inc()

    def _leave(self, model: str, tenant: str, *, answered: bool) -> None:
        self._admission.leave(model, time.monotonic(), answered=answered, tenant=tenant)
        self._metrics.in_flight.dec()


def code_of(reply: Message) -> str:
    """`ok`, or the code of the error that the reply tells. Raises `Internal` for what is no
    reply of ours."""
    code = reply.headers.get(HEADER_CODE)
    if code == "ok":
        return code
    if not isinstance(code, str) or code not in STATUS or v2.error_message(reply.body) is None:
        log.error("malformed_reply", code=repr(code)[:60], body=repr(reply.body[:200]))
        raise Internal("the reply to this request is malformed")
    return code


def _ran(reply: Message, rows: int, waited_s: float) -> Ran:
    told = [reply.headers.get(name) for name in (HEADER_BATCH, HEADER_COMPUTE_US)]
    batch_rows, compute_us = (value if isinstance(value, int) else 0 for value in told)
    return Ran(rows, batch_rows, waited_s, compute_us)
