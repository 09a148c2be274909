"""Bad input over HTTP, and what it gets: a status, a message that says what was wrong, always as
{"error": …}; nothing reaches a worker and nothing is kept."""

from __future__ import annotations

import asyncio
import gzip
import zlib

import msgspec
import pytest
import pytest_asyncio

from shared import names
from shared.models import ModelSpec, TensorSpec
from tests.archives import torchscript
from tests.gateway_rig import JSON_BODY, digest_of, running, until

X = JSON_BODY["inputs"][0]


# One gateway for all: that it still stands after the last of them is the point.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lasting_rig(tmp_path_factory):
    path = tmp_path_factory.mktemp("gateway")
    async with running(path, request_limit_bytes=100_000, upload_limit_bytes=200_000) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def rig(lasting_rig):
    yield lasting_rig
    assert lasting_rig.worker.seen == [], "what is wrong must not reach a worker"
    assert await lasting_rig.metric("roost_gateway_held_bytes") == 0
    assert await lasting_rig.metric("roost_gateway_in_flight_requests") == 0


def requests(code, model):
    version = "1" if model else ""
    return f'roost_gateway_requests_total{{code="{code}",model="{model}",version="{version}"}}'


def refused(answer, status, *words):
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    message = answer.json()["error"]
    assert all(word in message for word in words), message
    assert answer.headers["content-type"] == "application/json"


# --- names and paths -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["..", "a..b", "%2e%2e", "a%2fb", "a%00b", "a%0ab", "n" * 129, "", "%20", "-a", "%C3%A4"],
)
async def test_model_names_that_are_none(rig, name):
    """Paths, empty, over-long, control characters: 400, and no label in the metrics."""
    before = await rig.metric(requests("invalid_argument", ""))
    answer = await raw(rig, "POST", f"/v2/models/{name}/infer", b"{}")
    assert b" 400 " in answer.split(b"\r\n")[0]
    assert b'{"error":' in answer
    assert await rig.metric(requests("invalid_argument", "")) == before + 1


@pytest.mark.parametrize("version", ["0", "-1", "X", "1.0", "99999999999", "1%00", "%D9%A1"])
async def test_versions_that_are_none(rig, version):
    """Anything but a whole number from 1, or what can be an alias."""
    answer = await raw(rig, "POST", f"/v2/models/adder/versions/{version}/infer", b"{}")
    assert b" 400 " in answer.split(b"\r\n")[0]
    refused(await rig.http.get("/v2/models/adder/versions/X"), 400, "version")
    refused(await rig.http.get("/v2/models/adder/versions/0/ready"), 400, "version")


async def raw(rig, method, path, body):
    """A request as it is: clients tidy paths up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    head = f"{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_unknown_models_and_versions(rig):
    """404 that names it, everywhere."""
    before = await rig.metric(requests("not_found", ""))
    refused(await rig.infer(name="absent"), 404, "absent")
    refused(await rig.http.post("/v2/models/adder/versions/7/infer"), 404, "adder", "7")
    for path in ("", "/config", "/ready"):
        refused(await rig.http.get(f"/v2/models/absent{path}"), 404, "absent")
    refused(await rig.http.get("/v2/repository/models/absent"), 404, "absent")
    refused(await rig.http.delete("/v2/repository/models/absent"), 404, "absent")
    assert await rig.metric(requests("not_found", "")) == before + 2


async def test_unknown_paths_and_methods(rig):
    """404 and 405 are JSON too."""
    refused(await rig.http.get("/nowhere"), 404, "Not Found")
    refused(await rig.http.get("/v2/models/adder/generate"), 404, "Not Found")
    refused(await rig.http.get("/v2/models/adder/infer"), 405, "Method Not Allowed")
    answer = await rig.http.post("/v2/health/live")
    refused(answer, 405, "Method Not Allowed")
    assert "GET" in answer.headers["allow"]
    refused(await rig.http.get("/v2/models/a%2Fb/ready"), 400, "'/'")


# --- tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([X | {"shape": [1, 4]}], ["'x'"]),
        ([X | {"shape": [1, -3]}], ["'x'"]),
        ([X | {"shape": [2**62, 2**62]}], ["'x'"]),
        ([X | {"shape": [9, 3], "data": [0.0] * 27}], ["'x'", "9 rows", "1 to 8"]),
        ([X | {"datatype": "INT64", "data": [1, 2, 3]}], ["'x'", "FP32", "INT64"]),
        ([X | {"datatype": "FLOAT"}], ["'x'", "datatype"]),
        ([X | {"data": [1.0, 2.0]}], ["'x'"]),
        ([X | {"data": [1.0, "a", 2.0]}], ["'x'"]),
        ([], ["'x'", "missing"]),
        ([X, X], ["'x'", "more than once"]),
        ([X, X | {"name": "z"}], ["'z'", "unknown"]),
        ([{"name": "x", "datatype": "FP32", "shape": [1, 3]}], ["'x'"]),
    ],
)
async def test_tensors_that_are_not_what_the_model_takes(rig, inputs, words):
    """400 that names the tensor and what was expected."""
    before = await rig.metric(requests("invalid_argument", "adder"))
    refused(await rig.infer({"inputs": inputs}), 400, *words)
    assert await rig.metric(requests("invalid_argument", "adder")) == before + 1


def binary(size, claimed=None, **more):
    head = {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 3],
             "parameters": {"binary_data_size": size if claimed is None else claimed}} | more
        ]
    }  # fmt: skip
    header = msgspec.json.encode(head)
    return header + bytes(size), {names.HEADER_LENGTH: str(len(header))}


@pytest.mark.parametrize(
    ("size", "claimed", "words"),
    [(11, None, ["'x'"]), (12, 16, ["'x'"]), (16, 12, ["4 bytes are left"]), (12, -12, ["'x'"])],
)
async def test_binary_sizes_that_disagree(rig, size, claimed, words):
    """Claimed, there, and what the shape takes must be one."""
    body, headers = binary(size, claimed)
    refused(await rig.infer(body, headers=headers), 400, *words)


@pytest.mark.parametrize("length", ["-1", "x", "1.5", "", "99999999999999999999", "100001"])
async def test_header_lengths_that_are_none(rig, length):
    """Not a number, negative, or beyond the body."""
    body, _ = binary(12)
    refused(await rig.infer(body, headers={names.HEADER_LENGTH: length}), 400, "header length")


async def test_bytes_with_a_wrong_length_prefix(rig):
    """A BYTES element that claims more than there is."""
    model = ModelSpec(inputs=(TensorSpec("x", "BYTES", (1,)),), max_batch_size=4)
    rig.register("strings", model)
    body, headers = binary(6, None, datatype="BYTES", shape=[1, 1])
    body = body[:-6] + (100).to_bytes(4, "little") + b"ab"
    refused(await rig.infer(body, "strings", headers=headers), 400, "'x'")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"inputs": 1}', b"[" * 50_000, b'{"a":' * 10_000],
    ids=lambda body: body[:12].decode("latin-1"),
)
async def test_bodies_that_are_no_request(rig, body):
    """Empty, truncated, wrong type, not UTF-8, absurdly deep."""
    refused(await rig.infer(body), 400)


async def test_a_json_header_longer_than_any_sane_one(tmp_path):
    """Before raw tensors the JSON only describes them."""
    async with running(tmp_path) as rig:
        body = b" " * 1_100_000 + binary(12)[0]
        length = {names.HEADER_LENGTH: str(len(body) - 12)}
        refused(await rig.infer(body, headers=length), 413, "1048576")


async def test_raw_requests_need_one_known_input(rig):
    """Without a header it must be clear which tensor the body is."""
    rig.register("unknown", ModelSpec())
    zero = {names.HEADER_LENGTH: "0"}
    refused(await rig.infer(bytes(12), "unknown", headers=zero), 400, "raw binary")
    refused(await rig.infer(bytes(11), headers=zero), 400, "'x'")


@pytest.mark.parametrize(
    "parameters",
    [{"timeout": -1}, {"timeout": "soon"}, {"priority": 1.5}, {"triton_x": 1}, {"sequence_id": 1}],
)
async def test_parameters_that_are_reserved_or_wrong(rig, parameters):
    """400 that names the parameter."""
    answer = await rig.infer(JSON_BODY | {"parameters": parameters})
    refused(answer, 400, next(iter(parameters)))


async def test_a_deadline_header_that_is_none(rig):
    """Not a time: 400."""
    headers = {names.HEADER_DEADLINE: "soon"}
    refused(await rig.infer(headers=headers), 400, names.HEADER_DEADLINE)


# --- size, time and encoding ---------------------------------------------------------------


async def test_bodies_that_are_too_large(rig):
    """By Content-Length before a byte is read, or counted while it streams."""
    refused(await rig.infer(bytes(100_001)), 413, "100001", "100000")

    async def pieces():
        for _ in range(3):
            yield bytes(40_000)

    answer = await rig.http.post("/v2/models/adder/infer", content=pieces())
    refused(answer, 413, "100000")


@pytest.mark.parametrize(
    ("encoding", "body", "status", "word"),
    [
        ("br", b"x", 400, "'br'"),
        ("gzip", b"not gzip", 400, "malformed"),
        ("gzip", gzip.compress(b"{}")[:-4], 400, "truncated"),
        ("deflate", zlib.compress(b"{}") + b"more", 400, "after its end"),
        ("gzip", gzip.compress(bytes(50_000_000)), 413, "decompressed"),
        ("deflate", zlib.compress(bytes(50_000_000)), 413, "decompressed"),
    ],
)
async def test_compressed_bodies_that_lie(rig, encoding, body, status, word):
    """Unknown, damaged, truncated, followed by more, or a bomb."""
    answer = await rig.infer(body, headers={"Content-Encoding": encoding})
    refused(answer, status, word)


async def test_a_slow_body_ends_with_408(tmp_path):
    """One deadline for the whole body: a trickle does not prolong it."""
    async with running(tmp_path, body_timeout_s=0.2) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(
            b"POST /v2/models/adder/infer HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n"
        )
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'{"error":"the body did not arrive' in answer
        writer.close()
        await writer.wait_closed()


async def test_a_body_that_breaks_off(rig):
    """The client went away while sending: counted, and the room is given back."""
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(b"POST /v2/models/adder/infer HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nab")
    writer.close()
    await writer.wait_closed()

    async def noticed():
        return await rig.metric(requests("client_closed", "adder")) == 1

    await until(noticed)


async def test_no_content_type_is_ever_wanted(tmp_path):
    """tritonclient sends none, or octet-stream for JSON: both are taken."""
    async with running(tmp_path) as rig:
        for headers in ({}, {"Content-Type": "application/octet-stream"}, {"Content-Type": "x"}):
            assert (await rig.infer(headers=headers)).status_code == 200


# --- the server's own refusals ---------------------------------------------------------------


async def test_what_is_not_http_is_refused_as_json(rig):
    """Also what never becomes a request is answered as {"error": …}."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(b"GET nowhere\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert list(msgspec.json.decode(body)) == ["error"]
    writer.close()
    await writer.wait_closed()


# --- the repository ------------------------------------------------------------------------


async def put(rig, data, digest=None):
    return await rig.http.put(f"/v2/repository/blobs/{digest or digest_of(data)}", content=data)


def registration(data, **spec):
    return {"digest": digest_of(data), "spec": spec}


def blobs(rig):
    """Every file of the repository, unfinished uploads too."""
    return sorted(path for path in rig.root.rglob("*") if path.is_file())


async def test_uploads_are_idempotent_and_can_be_asked_for(rig):
    """HEAD tells whether a file is there; sending it again changes nothing."""
    data = torchscript(b"idempotent" * 50)
    url = f"/v2/repository/blobs/{digest_of(data)}"
    assert (await rig.http.head(url)).status_code == 404
    assert (await put(rig, data)).status_code == 201
    assert (await put(rig, data)).status_code == 200
    found = await rig.http.head(url)
    assert found.status_code == 200
    assert found.headers["roost-blob-size"] == str(len(data))


async def test_a_checksum_that_does_not_match_keeps_nothing(rig):
    """400 with both digests; neither is there afterwards."""
    before = blobs(rig)
    data = torchscript(b"mismatch" * 50)
    wrong = digest_of(b"something else")
    refused(await put(rig, data, wrong), 400, wrong, digest_of(data))
    for digest in (wrong, digest_of(data)):
        assert (await rig.http.head(f"/v2/repository/blobs/{digest}")).status_code == 404
    assert blobs(rig) == before


@pytest.mark.parametrize("digest", ["sha256:12", "md5:" + "0" * 32, "sha256:" + "G" * 64])
async def test_digests_that_are_none(rig, digest):
    """400 before a byte is kept."""
    refused(await put(rig, b"x", digest), 400, "digest")


async def test_uploads_that_are_too_large(rig):
    """By Content-Length or while streaming; nothing is kept."""
    before = blobs(rig)
    data = bytes(200_001)
    refused(await put(rig, data), 413, "200000")

    async def pieces():
        yield data[:100_000]
        yield data[100_000:]

    answer = await rig.http.put(f"/v2/repository/blobs/{digest_of(data)}", content=pieces())
    refused(answer, 413, "200000")
    assert blobs(rig) == before


async def test_files_that_are_not_torchscript(rig):
    """Stored as bytes, refused as a model: not a zip, truncated."""
    for data in (b"not a model", torchscript(bytes(500))[:-100]):
        assert (await put(rig, data)).status_code == 201
        answer = await rig.http.post(
            "/v2/repository/models/nomodel/versions", json=registration(data)
        )
        refused(answer, 400)
    refused(await rig.http.get("/v2/models/nomodel"), 404, "nomodel")


async def test_a_version_never_changes(rig):
    """The same again is the same manifest; other bytes or another spec are 409."""
    one, other = torchscript(b"1" * 500), torchscript(b"2" * 500)
    await put(rig, one)
    await put(rig, other)
    url = "/v2/repository/models/new/versions/3"
    first = await rig.http.put(url, json=registration(one))
    assert first.status_code == 201
    assert first.json()["version"] == 3
    assert (await rig.http.put(url, json=registration(one))).json() == first.json()
    refused(await rig.http.put(url, json=registration(other)), 409, "immutable")
    refused(await rig.http.put(url, json=registration(one, target_ms=5)), 409, "immutable")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[]", b'{"digest": 1}', b'{"digest": "sha256:0"}', b"[" * 100_000,
        msgspec.json.encode({"digest": "sha256:" + "0" * 64}),
        msgspec.json.encode({"digest": "sha256:" + "0" * 64, "spec": {"max_batch": 1}}),
        msgspec.json.encode({"digest": "sha256:" + "0" * 64, "spec": {"max_batch_size": -1}}),
    ],
    ids=lambda body: body[-24:].decode(),
)  # fmt: skip
async def test_registrations_that_are_none(rig, body):
    """400: not JSON, a digest that is none or not there, an unknown or impossible setting."""
    refused(await rig.http.post("/v2/repository/models/new/versions", content=body), 400)


async def test_uploads_and_registrations_are_counted_by_code(rig):
    """Good ones and bad ones, so that an alert can tell a client that keeps failing."""

    async def counts():
        codes = ("ok", "invalid_argument", "already_exists", "too_large")
        line = 'roost_gateway_registrations_total{{code="{}"}}'.format
        return [await rig.metric(line(code)) for code in codes]

    before = await counts()
    one, other = torchscript(b"3" * 500), torchscript(b"4" * 500)
    await put(rig, one)
    await put(rig, other)
    await put(rig, bytes(200_001))
    await put(rig, one, digest_of(b"mismatch"))
    url = "/v2/repository/models/counted/versions/1"
    await rig.http.put(url, json=registration(one))
    await rig.http.put(url, json=registration(other))
    await rig.http.post("/v2/repository/models/counted/versions", content=b"{")
    await rig.http.post("/v2/repository/models/-a/versions", json=registration(one))
    gained = [after - old for after, old in zip(await counts(), before, strict=True)]
    assert gained == [3, 3, 1, 1]


async def test_names_and_versions_are_checked_when_registering(rig):
    """The same rules as everywhere."""
    data = torchscript(b"w" * 500)
    await put(rig, data)
    for path in ("models/a..b/versions", "models/-a/versions", f"models/{'n' * 129}/versions"):
        answer = await rig.http.post(f"/v2/repository/{path}", json=registration(data))
        refused(answer, 400, "model name")
    answer = await rig.http.put("/v2/repository/models/a/versions/0", json=registration(data))
    refused(answer, 400, "version")


async def test_the_index_filter(rig):
    """Empty, JSON, or 400."""
    for body in (b"", b"{}", b'{"ready":true}'):
        answer = await rig.http.post("/v2/repository/index", content=body)
        assert "adder" in [item["name"] for item in answer.json()]
    refused(await rig.http.post("/v2/repository/index", content=b'{"ready":1}'), 400, "filter")
