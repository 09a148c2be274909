"""Both Python clients against a gateway that answers by a script, over real connections."""

from __future__ import annotations

import asyncio
import inspect
import uuid

import httpx
import msgspec
import numpy as np
import pytest

from roost.calls.answers import item
from roost.calls.call import Call
from roost.calls.sending import AsyncSender, Sender
from roost.client import AsyncRoostClient, RoostClient
from shared import v2
from shared.errors import (
    InvalidRequest,
    JobNotDone,
    ModelFailed,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from shared.models import Manifest
from shared.names import HEADER_LENGTH
from shared.tenants import Quota
from shared.tensors import from_numpy, to_numpy
from tests.serving import served

X = {"x": np.asarray([[1.0, 2.0]], np.float32)}
LOST = None
"""The connection is closed instead of an answer."""


def answer(status: int, body: object = None, code: str = "", **headers: str) -> bytes:
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    told = {"content-length": str(len(content)), **headers}
    if code:
        told["roost-code"] = code
    lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {value}" for name, value in told.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


def refused(status: int, code: str, **headers: str) -> bytes:
    return answer(status, {"error": f"it is {code}"}, code, **headers)


NOT_DONE = refused(409, "job_not_done", **{"retry-after": "0"})


def outputs() -> bytes:
    """A binary response with y = 3."""
    y = from_numpy("y", np.asarray([[3.0]], np.float32))
    asked = v2.InferRequest(binary_default=True)
    body, length = v2.encode_response("m", 1, None, [y], asked)
    return answer(200, body, **{HEADER_LENGTH: str(length)})


class Scripted:
    """Says one thing after the other, and remembers what was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.says: list[bytes | None] = []
        self.asked: list[tuple[str, dict[str, str], bytes]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            pairs = (line.partition(": ") for line in head[1:] if line)
            headers = {name.lower(): value for name, _, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.asked.append((head[0].removesuffix(" HTTP/1.1"), headers, body))
            said = self.says.pop(0)
            if said is LOST:
                return
            writer.write(said)


@pytest.fixture
async def gateway():
    made = Scripted()
    async with served(made.serve) as made.url:
        yield made


class Blocking:
    """The blocking client, each of its methods in a thread."""

    def __init__(self, url: str) -> None:
        self._client = RoostClient(url)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self._client.close()

    def __getattr__(self, name):
        method = getattr(self._client, name)

        async def call(*args, **named):
            return await asyncio.to_thread(method, *args, **named)

        return call


@pytest.fixture(params=[Blocking, AsyncRoostClient])
async def client(request, gateway):
    async with request.param(gateway.url) as made:
        yield made


# --- the two are one -----------------------------------------------------------------------


def methods_of(client: type) -> dict[str, inspect.Signature]:
    found = inspect.getmembers(client, inspect.isfunction)
    return {name: inspect.signature(f) for name, f in found if not name.startswith("_")}


def test_both_clients_have_the_same_methods() -> None:
    """By name and signature, but for `await`; and they are made of the same."""
    assert methods_of(RoostClient) == methods_of(AsyncRoostClient)
    assert inspect.signature(RoostClient) == inspect.signature(AsyncRoostClient)
    for name in methods_of(RoostClient):
        assert inspect.iscoroutinefunction(getattr(AsyncRoostClient, name)), name
        assert not inspect.iscoroutinefunction(getattr(RoostClient, name)), name


# --- what is asked, and what is made of the answer -------------------------------------------

ITEMS = [{"a": 1}]
OPERATIONS = {
    "list": ((), "GET /v2/repository/index", ITEMS, ITEMS),
    "remove": (("m", 2), "DELETE /v2/repository/models/m/versions/2", None, None),
    "unload": (("m",), "POST /v2/repository/models/m/unload", None, None),
    "load": (("m",), "POST /v2/repository/models/m/load", None, None),
    "aliases": (("m",), "GET /v2/repository/models/m/aliases", {"aliases": ITEMS}, ITEMS),
    "set_alias": (("m", "prod", 2), "PUT /v2/repository/models/m/aliases/prod", {"a": 1}, {"a": 1}),
    "remove_alias": (("m", "prod"), "DELETE /v2/repository/models/m/aliases/prod", None, None),
    "quarantined": ((), "GET /v2/repository/quarantine", {"quarantined": ITEMS}, ITEMS),
    "release": (
        ("m", 2),
        "DELETE /v2/repository/models/m/versions/2/quarantine",
        {"released": ["m/2"]},
        ["m/2"],
    ),
    "list_keys": ((), "GET /v2/repository/keys", {"keys": ITEMS}, ITEMS),
    "create_key": (("acme",), "POST /v2/repository/keys", {"key": "rk"}, {"key": "rk"}),
    "revoke_key": (("a/b",), "DELETE /v2/repository/keys/a%2Fb", None, None),
    "tenants": ((), "GET /v2/repository/tenants", {"tenants": ITEMS}, ITEMS),
    "set_tenant": (("acme", Quota()), "PUT /v2/repository/tenants/acme", None, None),
    "remove_tenant": (("acme",), "DELETE /v2/repository/tenants/acme", None, None),
    "metadata": (("m", "prod"), "GET /v2/models/m/versions/prod", {"name": "m"}, {"name": "m"}),
    "ready": ((), "GET /v2/health/ready", None, True),
    "job": (("1f",), "GET /v2/jobs/1f", {"id": "1f"}, {"id": "1f"}),
    "cancel": (("1/f",), "DELETE /v2/jobs/1%2Ff", None, None),
}


@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_operation(client, gateway, name) -> None:
    """One request, as docs/http.md has it, and the answer as the method promises it; a refusal
    is raised as what it is."""
    arguments, line, told, expected = OPERATIONS[name]
    gateway.says = [answer(200, told)]
    assert await getattr(client, name)(*arguments) == expected
    assert [asked[0] for asked in gateway.asked] == [line]
    if name != "ready":
        gateway.says = [refused(429, "resource_exhausted", **{"retry-after": "7"})]
        with pytest.raises(Overloaded, match="it is resource_exhausted") as caught:
            await getattr(client, name)(*arguments)
        assert caught.value.retry_after_s == 7


async def test_ready_is_false_when_nobody_answers(client, gateway) -> None:
    """And when the gateway says that it is not."""
    gateway.says = [refused(503, "unavailable"), LOST]
    assert not await client.ready()
    assert not await client.ready()


async def test_infer_sends_and_reads_raw_tensors(client, gateway) -> None:
    """The deadline is a parameter, in microseconds; outputs come by name."""
    gateway.says = [outputs()]
    found = await client.infer("m", X, 2, timeout_s=1.5, outputs=["y"])
    assert found["y"].tolist() == [[3.0]]
    ((line, headers, body),) = gateway.asked
    assert line == "POST /v2/models/m/versions/2/infer"
    request = v2.decode_request(body, int(headers[HEADER_LENGTH.lower()]))
    assert to_numpy(request.inputs[0]).tolist() == [[1.0, 2.0]]
    assert request.parameters["timeout"] == 1_500_000
    assert request.outputs is not None
    assert [output.name for output in request.outputs] == ["y"]


async def test_a_file_is_sent_only_when_it_is_missing(client, gateway, tmp_path) -> None:
    """Registered by its digest; sent in pieces, and told how far."""
    file = tmp_path / "model.pt"
    file.write_bytes(b"x" * 2_500_000)
    manifest = Manifest(name="m", version=1, digest="sha256:1", size_bytes=1, created_at=0)
    told: list[tuple[int, int]] = []
    gateway.says = [answer(404, b""), answer(201, b""), answer(201, manifest)]
    pushed = await client.push("m", file, progress=lambda *at: told.append(at))
    assert pushed.id == "m/1"
    assert [line.split()[0] for line, _, _ in gateway.asked] == ["HEAD", "PUT", "POST"]
    assert gateway.asked[1][2] == file.read_bytes()
    assert told[-1] == (2_500_000, 2_500_000)
    gateway.says = [answer(200, b""), answer(200, manifest)]
    await client.push("m", file, version=1)
    assert gateway.asked[-1][0] == "PUT /v2/repository/models/m/versions/1"
    with pytest.raises(InvalidRequest, match="cannot read"):
        await client.push("m", tmp_path / "none.pt")
    assert len(gateway.asked) == 5


# --- jobs ----------------------------------------------------------------------------------


async def test_a_job_is_submitted_with_a_key_of_its_own(client, gateway) -> None:
    """A random UUID each time, or the one that is given."""
    gateway.says = [answer(202, {"id": "1f"})] * 3
    for _ in range(2):
        assert await client.submit("m", X, timeout_s=60) == {"id": "1f"}
    await client.submit("m", X, "prod", idempotency_key="invoice-17")
    keys = [headers["idempotency-key"] for _, headers, _ in gateway.asked]
    assert [uuid.UUID(key).version for key in keys[:2]] == [4, 4]
    assert len(set(keys)) == 3
    assert keys[2] == "invoice-17"
    lines = [line for line, _, _ in gateway.asked]
    assert lines[1:] == ["POST /v2/models/m/jobs", "POST /v2/models/m/versions/prod/jobs"]
    _, headers, body = gateway.asked[0]
    request = v2.decode_request(body, int(headers[HEADER_LENGTH.lower()]))
    assert request.parameters["timeout"] == 60_000_000


@pytest.mark.parametrize("key", ["", "a b", "ü", "a\r\nx: y", "k" * 256])
async def test_what_can_be_no_key_is_refused(client, gateway, key) -> None:
    """Before anything is asked."""
    with pytest.raises(InvalidRequest, match="idempotency key"):
        await client.submit("m", X, idempotency_key=key)
    assert gateway.asked == []


async def test_a_submission_whose_answer_was_lost_is_sent_again(client, gateway) -> None:
    """Once, and it is the very same request: the gateway knows it by its key."""
    gateway.says = [LOST, answer(202, {"id": "1f"})]
    assert (await client.submit("m", X))["id"] == "1f"
    first, second = gateway.asked
    assert first == second
    gateway.says = [LOST, LOST]
    with pytest.raises(Unavailable, match="no answer from"):
        await client.submit("m", X)
    assert len(gateway.asked) == 4


async def test_nothing_else_that_does_something_is_sent_again(client, gateway) -> None:
    """Who knows what a lost answer would have been; nor is a refusal asked about again."""
    gateway.says = [LOST, LOST, refused(503, "unavailable")]
    with pytest.raises(Unavailable):
        await client.infer("m", X)
    with pytest.raises(Unavailable):
        await client.unload("m")
    with pytest.raises(Unavailable):
        await client.submit("m", X)
    assert len(gateway.asked) == 3


@pytest.mark.parametrize(
    ("error", "sent"),
    [
        (httpx.ReadError, 2),
        (httpx.WriteError, 2),
        (httpx.ConnectError, 2),
        (httpx.RemoteProtocolError, 2),
        (httpx.ReadTimeout, 1),
        (httpx.ConnectTimeout, 1),
        (httpx.PoolTimeout, 1),
        (httpx.LocalProtocolError, 1),
    ],
)
async def test_a_time_out_is_no_lost_connection(error, sent) -> None:
    """What may be sent again is not where the answer was only slow to come, or the request
    could not be sent at all."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        raise error("it failed")

    call = Call("GET", "http://gateway/", item, again=True)
    options = {"transport": httpx.MockTransport(handle)}
    with Sender("http://gateway", options) as blocking, pytest.raises(Unavailable, match="failed"):
        blocking.do(call)
    assert len(seen) == sent
    waiting = AsyncSender("http://gateway", options)
    with pytest.raises(Unavailable, match="failed"):
        await waiting.do(call)
    await waiting.close()
    assert len(seen) == 2 * sent


async def test_a_result_is_asked_for_once_unless_told_to_wait(client, gateway) -> None:
    """A job that has not ended has no result: which is told, with when to look again."""
    gateway.says = [NOT_DONE, outputs()]
    with pytest.raises(JobNotDone) as caught:
        await client.result("1f")
    assert caught.value.retry_after_s == 0
    assert (await client.result("1f"))["y"].tolist() == [[3.0]]
    assert [line for line, _, _ in gateway.asked] == ["GET /v2/jobs/1f/result"] * 2


@pytest.mark.parametrize("wait_s", [None, 600])
async def test_a_result_is_waited_for(client, gateway, wait_s) -> None:
    """Past looks at a job that has not ended, a lost connection, and a gateway that is away."""
    away = refused(503, "unavailable", **{"retry-after": "0"})
    gateway.says = [NOT_DONE, NOT_DONE, LOST, NOT_DONE, away, outputs()]
    assert (await client.result("1f", wait_s))["y"].tolist() == [[3.0]]
    assert gateway.says == []


async def test_a_job_that_failed_is_not_waited_for(client, gateway) -> None:
    """Its result is the error; one that was cancelled, or never was, has none."""
    gateway.says = [NOT_DONE, refused(500, "model_failed"), refused(404, "not_found")]
    with pytest.raises(ModelFailed):
        await client.result("1f", None)
    with pytest.raises(ModelNotFound):
        await client.result("1f", None)
    assert gateway.says == []
