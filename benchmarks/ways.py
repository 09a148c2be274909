"""Ways to ask whose answers are known: over HTTP, AMQP and gRPC, and as a job."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import Sequence
from typing import Final, Protocol
from urllib.parse import urlsplit

import grpc
import grpc.aio

from benchmarks.asking import acknowledge
from benchmarks.keepalive import Answer, Connection, connect, request
from benchmarks.known import WIDTH, Model, body
from benchmarks.ledger import Ended, Ledger, Verdict, compared, judged
from services.gateway.grpc import inference_pb2 as pb
from shared.broker.port import Broker, Delivery, Message, PublishUncertain
from shared.errors import RoostError
from shared.names import HEADER_CODE, HEADER_DEADLINE, INFER_EXCHANGE, REPLY_QUEUE_PREFIX

DEADLINE_S: Final = 20.0
"""Of a request; patient clients give as much more as a broker may need to come again."""
PATIENT_DEADLINE_S: Final = 90.0
SLACK_S: Final = 10.0
"""After the deadline, within which the answer that it has passed must have come: longer than any
part is suspended."""
LATE_S: Final = 90.0
"""A producer that is answered by nobody yet waits so much longer: while the broker or all workers
are away there is nobody who could say that the deadline has passed (docs/guarantees.md)."""
JOB_DEADLINE_S: Final = 300.0
_JOB_LOOK_S: Final = 1.0
_IDLE_S: Final = 1.0
"""A kept connection that is lost this soon was being closed while idle: clients ask anew."""
_AGAIN_S: Final = 0.2
_INFER: Final = "/inference.GRPCInferenceService/ModelInfer"


class Way(Protocol):
    """One way to ask. `patient` clients do as load balancers and client libraries do: what was not
    accepted, or was told to come again (503), they try anew elsewhere until the deadline. Others
    take the first ending as it is."""

    name: str

    async def start(self) -> None: ...

    async def ask(self, model: Model, x: list[int]) -> Ended: ...

    async def close(self) -> None: ...


class Http:
    """Keep-alive connections to each gateway in turn, as many as are needed."""

    name = "http"

    def __init__(self, gateways: Sequence[str], ledger: Ledger, *, patient: bool = False) -> None:
        self.deadline_s = PATIENT_DEADLINE_S if patient else DEADLINE_S
        self._gateways = [urlsplit(url) for url in gateways]
        self._free: list[list[Connection]] = [[] for _ in gateways]
        self._turn = itertools.count()
        self._ledger = ledger
        self._patient = patient

    async def start(self) -> None:
        """Connections are made when they are needed."""

    async def ask(self, model: Model, x: list[int]) -> Ended:
        wanted = request("POST", f"/v2/models/{model.name}/infer", body(x, self.deadline_s))
        answer = await self.send(wanted, self.deadline_s + SLACK_S)
        if isinstance(answer, Answer):
            return judged(answer.status, answer.body, model, x)
        return Ended(answer)

    async def send(self, wanted: bytes, timeout_s: float) -> Answer | Verdict:
        """What a gateway answers, or what became of the request instead."""
        until = time.monotonic() + self.deadline_s
        while True:
            answer = await self._once(wanted, timeout_s)
            busy = isinstance(answer, Answer) and answer.status == 503
            again = busy or answer is Verdict.REFUSED
            if not (self._patient and again and time.monotonic() < until):
                return answer
            self._ledger.again += 1
            await asyncio.sleep(_AGAIN_S)

    async def _once(self, wanted: bytes, timeout_s: float) -> Answer | Verdict:
        which = next(self._turn) % len(self._gateways)
        url, free = self._gateways[which], self._free[which]
        while True:
            reused = bool(free)
            try:
                connection = (
                    free.pop() if free else await connect(url.hostname or "", url.port or 0)
                )
            except OSError:
                return Verdict.REFUSED
            sent = time.monotonic()
            try:
                answer = await connection.ask(wanted, timeout_s=timeout_s)
            except TimeoutError:
                connection.close()
                return Verdict.SILENT
            if answer.status:
                free.append(connection)
                return answer
            if not (reused and time.monotonic() - sent < _IDLE_S):
                return Verdict.CUT

    async def close(self) -> None:
        for connection in itertools.chain(*self._free):
            connection.close()


class Amqp:
    """A producer, and the queue it hears its answers on."""

    name = "amqp"

    def __init__(self, broker: Broker, ledger: Ledger, *, patient: bool = False) -> None:
        self._deadline_s = PATIENT_DEADLINE_S if patient else DEADLINE_S
        self._broker = broker
        self._ledger = ledger
        self._patient = patient
        self._reply_to = f"{REPLY_QUEUE_PREFIX}faults-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count()
        self._waiting: dict[str, asyncio.Future[Message]] = {}
        self._answered: set[str] = set()
        self._acknowledging: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        await self._broker.declare_queue(self._reply_to, expires_s=24 * 3600)
        await self._broker.consume(self._reply_to, self._heard, prefetch=1000)

    async def ask(self, model: Model, x: list[int]) -> Ended:
        id_ = f"f{next(self._numbers)}"
        answer = self._waiting[id_] = asyncio.Future()
        asked = time.time()
        message = Message(
            body=body(x),
            headers={HEADER_DEADLINE: int((asked + self._deadline_s) * 1e3)},
            reply_to=self._reply_to,
            correlation_id=id_,
        )
        try:
            return await self._answer(message, model, x, answer, asked)
        finally:
            del self._waiting[id_]

    async def _answer(
        self,
        message: Message,
        model: Model,
        x: list[int],
        answer: asyncio.Future[Message],
        asked: float,
    ) -> Ended:
        sure = await self._published(message, model, asked + self._deadline_s)
        if sure is None:
            return Ended(Verdict.REFUSED)
        try:
            async with asyncio.timeout(self._deadline_s + SLACK_S + LATE_S):
                reply = await answer
        except TimeoutError:
            return Ended(Verdict.SILENT if sure else Verdict.UNSURE, message.correlation_id or "")
        self._ledger.late += time.time() > asked + self._deadline_s + SLACK_S
        code = reply.headers.get(HEADER_CODE)
        if code == "ok":
            return judged(200, reply.body, model, x)
        ended = judged(0, reply.body, model, x)  # an error must be one that can be read
        return Ended(Verdict.TOLD, str(code)) if ended.verdict is Verdict.TOLD else ended

    async def _published(self, message: Message, model: Model, until: float) -> bool | None:
        """True: the broker has it. False: nobody knows. None: it has not."""
        while True:
            try:
                await self._broker.publish(INFER_EXCHANGE, model.name, message)
                return True
            except PublishUncertain:
                if not self._patient:  # else once more: of two answers the second is dropped
                    return False
            except RoostError:
                if not (self._patient and time.time() < until):
                    return None
            self._ledger.again += 1
            await asyncio.sleep(_AGAIN_S)

    def _heard(self, delivery: Delivery) -> None:
        id_ = delivery.message.correlation_id or ""
        waiting = self._waiting.get(id_)
        if id_ in self._answered:
            # One that was not acknowledged in time comes again: that is the broker's, not an
            # answer more.
            self._ledger.doubles += not delivery.redelivered
        elif waiting is not None and not waiting.done():
            self._answered.add(id_)
            waiting.set_result(delivery.message)
        task = asyncio.ensure_future(acknowledge(delivery))
        self._acknowledging.add(task)
        task.add_done_callback(self._acknowledging.discard)

    async def close(self) -> None:
        while self._acknowledging:
            await asyncio.wait(set(self._acknowledging))


class Grpc:
    """A channel to each gateway, which gRPC keeps up."""

    name = "grpc"

    def __init__(self, gateways: Sequence[str], ledger: Ledger, *, patient: bool = False) -> None:
        self._deadline_s = PATIENT_DEADLINE_S if patient else DEADLINE_S
        self._addresses = gateways
        self._channels: list[grpc.aio.Channel] = []
        self._turn = itertools.count()
        self._ledger = ledger
        self._patient = patient

    async def start(self) -> None:
        # The default waits up to 2 minutes before it connects to a gateway that was away.
        options = [("grpc.max_reconnect_backoff_ms", 1000)]
        self._channels = [
            grpc.aio.insecure_channel(address, options=options) for address in self._addresses
        ]

    async def ask(self, model: Model, x: list[int]) -> Ended:
        until = time.monotonic() + self._deadline_s
        wanted = pb.ModelInferRequest(
            model_name=model.name,
            inputs=[
                pb.ModelInferRequest.InferInputTensor(
                    name="x",
                    datatype="FP32",
                    shape=[1, WIDTH],
                    contents=pb.InferTensorContents(fp32_contents=x),
                )
            ],
        )
        wanted.parameters["timeout"].int64_param = int(self._deadline_s * 1e6)
        while True:
            ended, again = await self._ended(wanted, model, x)
            if not (self._patient and again and time.monotonic() < until):
                return ended
            self._ledger.again += 1
            await asyncio.sleep(_AGAIN_S)

    async def _ended(
        self, wanted: pb.ModelInferRequest, model: Model, x: list[int]
    ) -> tuple[Ended, bool]:
        """And whether it may be asked again."""
        channel = self._channels[next(self._turn) % len(self._channels)]
        infer = channel.unary_unary(
            _INFER,
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        try:
            answer = await infer(wanted, timeout=self._deadline_s + SLACK_S)
        except grpc.aio.AioRpcError as error:
            return _failed(error)
        given = memoryview(answer.raw_output_contents[0]).cast("f").tolist()
        return compared(given, model, x), False

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def _failed(error: grpc.aio.AioRpcError) -> tuple[Ended, bool]:
    told = dict(error.trailing_metadata() or ()).get(HEADER_CODE)
    if told is not None:
        ended = Ended(Verdict.TOLD, f"grpc {told}: {error.details()}"[:60])
        return ended, error.code() is grpc.StatusCode.UNAVAILABLE
    # What follows gRPC says by itself; how far the call had come only its words say.
    said = error.details() or ""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Ended(Verdict.SILENT, said), False
    if "failed to connect" in said.lower() or "refused" in said.lower():
        return Ended(Verdict.REFUSED, said[:60]), True
    if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
        return Ended(Verdict.CUT, said[:60]), False
    return Ended(Verdict.WRONG, f"{error.code()}: {said}"), False


class Jobs:
    """A job: once accepted (202) it must have its result, whatever is restarted meanwhile. Asking
    after it is tried again, submitting is not."""

    name = "jobs"

    def __init__(self, http: Http) -> None:
        self._http = http

    async def start(self) -> None:
        """The connections are those of HTTP."""

    async def ask(self, model: Model, x: list[int]) -> Ended:
        wanted = request("POST", f"/v2/models/{model.name}/jobs", body(x, JOB_DEADLINE_S))
        submitted = await self._http.send(wanted, self._http.deadline_s + SLACK_S)
        if not isinstance(submitted, Answer):
            return Ended(submitted)
        if submitted.status != 202:
            return judged(submitted.status, submitted.body, model, x)
        id_ = str(json.loads(submitted.body)["id"])
        first = await self._result(id_)
        if first is None or first.status == 404:
            return Ended(Verdict.SILENT, f"{id_}: {first}")
        # There is one result: the other gateway has the same, to the byte.
        second = await self._result(id_)
        if second != first:
            return Ended(Verdict.WRONG, f"{id_}: {first} and {second}"[:200])
        await self._sent("DELETE", f"/v2/jobs/{id_}", 204)
        return judged(first.status, first.body, model, x)

    async def _result(self, id_: str) -> Answer | None:
        """None: it never came."""
        return await self._sent("GET", f"/v2/jobs/{id_}/result")

    async def _sent(self, method: str, path: str, *well: int) -> Answer | None:
        """Until it is answered with one of these, or with whatever says that all is over."""
        until = time.monotonic() + JOB_DEADLINE_S + SLACK_S
        while time.monotonic() < until:
            answer = await self._http.send(request(method, path), DEADLINE_S)
            if isinstance(answer, Answer) and (
                answer.status in well or answer.status not in {409, 429, 503}
            ):
                return Answer(answer.status, 0, answer.body)
            await asyncio.sleep(_JOB_LOOK_S)
        return None

    async def close(self) -> None:
        """Nothing is its own."""
