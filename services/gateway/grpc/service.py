"""The methods of `inference.GRPCInferenceService`. What they tell is decided where HTTP's is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NoReturn, TypeVar

import grpc
import grpc.aio
import msgspec
import structlog

from services.gateway.body import ClientGone, Held
from services.gateway.callers import Callers, asked_by, asking
from services.gateway.config import GatewayConfig
from services.gateway.core.admission import Admission
from services.gateway.grpc import inference_pb2 as pb
from services.gateway.grpc.context import Context, metadata_of
from services.gateway.grpc.infer import GrpcInference
from services.gateway.grpc.messages import parameters_of
from services.gateway.grpc.reading import NoMessage, parsed, receive
from services.gateway.grpc.statuses import refuse
from services.gateway.lifecycle import Lifecycle
from services.gateway.overrides import check_unload, decode_load
from services.gateway.routes import Routes
from services.gateway.rpc import Rpc
from services.gateway.statistics import Statistics
from services.gateway.status import Status
from shared.auth import ANYBODY, Caller, Need
from shared.errors import ECHOING, InvalidRequest, ModelNotFound, RoostError
from shared.logs import bound
from shared.names import check_name

log = structlog.get_logger(__name__)

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")
Serve = Callable[[Context], Awaitable[bytes]]
Admit = Callable[[Context], Awaitable[Caller]]

NAME: Final = "inference.GRPCInferenceService"
_BODY_BYTES: Final = 1024 * 1024
"""Of requests that only name something."""
_ABSENT: Final = {
    "ModelStreamInfer": "streams are not supported, use ModelInfer",
    **dict.fromkeys(
        (
            f"{kind}SharedMemory{what}"
            for kind in ("System", "Cuda")
            for what in ("Status", "Register", "Unregister")
        ),
        "shared memory is not supported",
    ),
    "TraceSetting": "trace settings are not supported",
    "LogSettings": "log settings are not supported",
}
"""Triton's methods that are not there, and what callers are told."""


class InferenceService:
    """One object per gateway."""

    def __init__(
        self,
        config: GatewayConfig,
        inference: GrpcInference,
        routes: Routes,
        status: Status,
        statistics: Statistics,
        lifecycle: Lifecycle,
        admission: Admission,
        rpc: Rpc,
        callers: Callers,
    ) -> None:
        self._config = config
        self._inference = inference
        self._routes = routes
        self._status = status
        self._statistics = statistics
        self._lifecycle = lifecycle
        self._admission = admission
        self._rpc = rpc
        self._callers = callers

    def handler(self) -> grpc.GenericRpcHandler:
        """All methods, for a server."""
        methods: dict[str, tuple[Need, Serve]] = {
            "ServerLive": ("open", self._told(pb.ServerLiveRequest, self.live)),
            "ServerReady": ("open", self._told(pb.ServerReadyRequest, self.ready)),
            "ServerMetadata": ("read", self._told(pb.ServerMetadataRequest, self.server)),
            "ModelReady": ("read", self._told(pb.ModelReadyRequest, self.model_ready)),
            "ModelMetadata": ("read", self._told(pb.ModelMetadataRequest, self.metadata)),
            "ModelConfig": ("read", self._told(pb.ModelConfigRequest, self.configuration)),
            "ModelStatistics": ("read", self._told(pb.ModelStatisticsRequest, self.statistics)),
            "ModelInfer": ("infer", self.infer),
            "RepositoryIndex": ("read", self._told(pb.RepositoryIndexRequest, self.index)),
            "RepositoryModelLoad": ("push", self.load),
            "RepositoryModelUnload": (
                "push",
                self._told(pb.RepositoryModelUnloadRequest, self.unload),
            ),
        }
        # Streams as gRPC's Python has it: then the message can be waited for within a time. On the
        # wire there is no difference.
        handlers = {
            name: grpc.stream_unary_rpc_method_handler(guarded(name, serve, self._admit(need)))
            for name, (need, serve) in methods.items()
        }
        for name, why in _ABSENT.items():
            handlers[name] = grpc.stream_unary_rpc_method_handler(
                guarded(name, _absent(why), self._admit("read"))
            )
        return grpc.method_handlers_generic_handler(NAME, handlers)

    # --- the server and its models

    async def live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ready(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._rpc.inviting)

    async def server(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(**self._status.server())

    async def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """As Triton answers it, an unknown model is one that is not ready."""
        try:
            ready, _ = await self._status.readiness(*await self._addressed(request))
        except ModelNotFound:
            ready = False
        return pb.ModelReadyResponse(ready=ready)

    async def metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        return pb.ModelMetadataResponse(
            **await self._status.metadata(*await self._addressed(request))
        )

    async def configuration(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        config = await self._status.configuration(*await self._addressed(request))
        return pb.ModelConfigResponse(config=pb.ModelConfig(**config))

    async def statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        if not request.name:
            return pb.ModelStatisticsResponse(**await self._statistics.of_all())
        name = check_name(request.name)
        versions = await self._routes.versions(name, request.version) if request.version else None
        return pb.ModelStatisticsResponse(**await self._statistics.of(name, versions))

    # --- inference

    async def infer(self, context: Context) -> bytes:
        correlation_id = self._rpc.new_id()
        with bound(model="", request_id=correlation_id):
            return await self._inference.answer(context, correlation_id)

    # --- the repository

    async def index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        _check_repository(request.repository_name)
        items = await self._status.index(ready_only=request.ready)
        wanted = ("name", "version", "state", "reason")
        return pb.RepositoryIndexResponse(
            models=[{key: item[key] for key in wanted} for item in items]
        )

    async def load(self, context: Context) -> bytes:
        config = self._config
        held = Held(self._admission, asking().tenant)
        try:
            data = await receive(context, held, config.load_limit_bytes, config.body_timeout_s)
            # Tens of megabytes would hold up everybody else.
            request, body = await asyncio.to_thread(_load_body, data)
            del data
            held.grow(len(body))
            loading = await asyncio.to_thread(decode_load, body)
            await self._lifecycle.load(check_name(request.model_name), loading)
        finally:
            held.release()
        return b""

    async def unload(
        self, request: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        _check_repository(request.repository_name)
        check_unload(_json_parameters(request.parameters))
        await self._lifecycle.unload(check_name(request.model_name))
        return pb.RepositoryModelUnloadResponse()

    # --- parts

    def _admit(self, need: Need) -> Admit:
        async def admit(context: Context) -> Caller:
            return await self._callers.admit(metadata_of(context), need)

        return open_to_all if need == "open" else admit

    async def _addressed(self, request: Any) -> tuple[str, int | None]:
        """Name and version, where an alias may stand for it. Raises `InvalidRequest`,
        `ModelNotFound`."""
        name = check_name(request.name)
        return name, await self._routes.version(name, request.version or None)

    def _told(self, kind: type[RequestT], answer: Callable[[RequestT], Awaitable[Any]]) -> Serve:
        async def serve(context: Context) -> bytes:
            data = await receive(context, None, _BODY_BYTES, self._config.body_timeout_s)
            told: bytes = (await answer(parsed(kind, data))).SerializeToString()
            return told

        return serve


async def open_to_all(_: Context) -> Caller:
    """Needs no key."""
    return ANYBODY


def guarded(
    name: str, serve: Callable[[Context], Awaitable[AnswerT]], admit: Admit
) -> Callable[[Any, Context], Awaitable[AnswerT]]:
    """Whoever is admitted, is served. Whatever goes wrong becomes a status; of what is our fault,
    the client learns no more."""

    async def call(_: Any, context: Context) -> AnswerT:
        try:
            with asked_by(await admit(context)):
                return await serve(context)
        except RoostError as error:
            if error.code in {"internal", "model_failed"}:  # the others could be a flood
                said = "" if error.code in ECHOING else error.message
                log.warning("request_failed", code=error.code, error=said)
            await refuse(context, error.code, error.message, error.retry_after_s)
        except ClientGone:
            raise asyncio.CancelledError from None  # for gRPC, which began it
        except NoMessage:
            await refuse(context, "invalid_argument", "the call has no message")
        except grpc.aio.AbortError:
            raise  # of `refuse`
        except Exception:
            log.exception("request_failed", method=name)
            await refuse(context, "internal", "internal error; the gateway's log has it")

    return call


def _absent(why: str) -> Callable[[Context], Awaitable[NoReturn]]:
    async def call(context: Context) -> NoReturn:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, why)
        raise AssertionError("aborted")

    return call


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest("'repository_name' is not supported: there is one repository")


def _load_body(data: bytes) -> tuple[pb.RepositoryModelLoadRequest, bytes]:
    """The request, and the same body that HTTP has."""
    request = parsed(pb.RepositoryModelLoadRequest, data)
    _check_repository(request.repository_name)
    return request, _json_parameters(request.parameters)


def _json_parameters(given: Mapping[str, Any]) -> bytes:
    # Bytes become base64, as they are over HTTP.
    return msgspec.json.encode({"parameters": parameters_of(given)})
