"""Bad input over HTTP, against a running stack: whoever asked is told what is wrong, it is
counted, and nothing is lost, stuck or restarted. Over AMQP: test_bad_messages.py."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from typing import Any

import httpx
import pytest

from shared.names import HEADER_LENGTH
from tests.archives import TORCHSCRIPT, archive, torchscript
from tests.e2e.steady import X, body, counted, of_x

pytestmark = pytest.mark.usefixtures("steady")

INFER = "/v2/models/doubler/infer"
OTHER = "sha256:" + "0" * 64


def binary(tail: bytes, **over: Any) -> dict[str, Any]:
    """A request whose one tensor is raw bytes after the JSON."""
    tensor = {k: v for k, v in X.items() if k != "data"}
    tensor |= {"parameters": {"binary_data_size": len(tail)}, **over}
    head = body(tensor)
    return {"content": head + tail, "headers": {HEADER_LENGTH: str(len(head))}}


def model(name: str) -> dict[str, Any]:
    return {"path": f"/v2/models/{name}/infer"}


def version(text: str) -> dict[str, Any]:
    return model(f"doubler/versions/{text}")


REQUESTS: dict[str, tuple[dict[str, Any], int, str]] = {
    # what is wrong: (the request, expected status, a word of the error)
    "name: path": (model("%2e%2e%2f%2e%2e%2fetc%2fpasswd"), 400, "model name"),
    "name: dots": (model("%2e%2e"), 400, "model name"),
    "name: slash": (model("a%2Fb"), 400, "model name"),
    "name: empty": (model(""), 400, "model name"),
    "name: over-long": (model("a" * 129), 400, "model name"),
    "name: far over-long": (model("a" * 20_000), 400, "model name"),
    "name: nul": (model("doubler%00"), 400, "model name"),
    "name: line feed": (model("doubler%0a"), 400, "model name"),
    "name: not utf-8": (model("%ff%fe"), 400, "model name"),
    "name: unknown": (model("nobody"), 404, "nobody"),
    "version: path": (version("..%2f1"), 400, "model version"),
    "version: empty": (version(""), 400, "model version"),
    "version: zero": (version("0"), 400, "model version"),
    "version: negative": (version("-1"), 400, "model version"),
    "version: over-long": (version("1" * 300), 400, "model version"),
    "version: line feed": (version("1%0a"), 400, "model version"),
    "version: unknown": (version("77"), 404, "77"),
    "shape: too few numbers": ({"content": of_x(data=[1.0])}, 400, "'x'"),
    "shape: too many numbers": ({"content": of_x(data=[1.0] * 4)}, 400, "'x'"),
    "shape: too few bytes": (binary(bytes(8)), 400, "12 bytes"),
    "shape: bytes left over": (binary(bytes(16), parameters={"binary_data_size": 12}), 400, "left"),
    "shape: bytes not there": (binary(b"", parameters={"binary_data_size": 12}), 400, "left"),
    "shape: negative": ({"content": of_x(shape=[-1, 3])}, 400, "0 or more"),
    "shape: product overflows": ({"content": of_x(shape=[2**40, 2**40])}, 400, "elements"),
    "shape: overflows": ({"content": of_x(shape=[1, 2**70])}, 400, "shape"),
    "shape: negative product": (binary(bytes(12), shape=[-1, -3]), 400, "0 or more"),
    "shape: no rows": ({"content": of_x(shape=[0, 3], data=[])}, 400, "rows"),
    "shape: too many rows": ({"content": of_x(shape=[17, 1], data=[1] * 17)}, 400, "1 to 16"),
    "shape: wrong rank": ({"content": of_x(shape=[3])}, 400, "expected"),
    "size: negative": (binary(bytes(12), parameters={"binary_data_size": -12}), 400, "'x'"),
    "datatype: wrong": ({"content": of_x(datatype="INT32", data=[1, 2, 3])}, 400, "FP32"),
    "datatype: none such": ({"content": of_x(datatype="FP7")}, 400, "datatype"),
    "datatype: other values": ({"content": of_x(data=["a", "b", "c"])}, 400, "'x'"),
    "input: missing": ({"content": body()}, 400, "'x'"),
    "input: unknown": ({"content": body(X, {**X, "name": "z"})}, 400, "'z'"),
    "input: repeated": ({"content": body(X, X)}, 400, "more than once"),
    "BYTES: prefix beyond": (
        binary(b"\xff\xff\xff\x7fabc", datatype="BYTES", shape=[1, 1]), 400, "claims"
    ),
    "BYTES: prefix cut": (binary(b"\x01\0", datatype="BYTES", shape=[1, 1]), 400, "4 bytes"),
    "BYTES: too few": (
        binary(b"\x01\0\0\0a", datatype="BYTES", shape=[1, 3]), 400, "BYTES elements"
    ),
    "JSON: deep": ({"content": b"[" * 100_000 + b"]" * 100_000}, 400, "deep"),
    "JSON: deep unclosed": ({"content": b'{"a":' * 50_000}, 400, "deep"),
    "JSON: long": (
        {
            "content": body(X, id="a" * (5 << 20)) + b"1234",
            "headers": {HEADER_LENGTH: str(len(body(X, id="a" * (5 << 20))))},
        },
        413,
        "header",
    ),
    "JSON: none": ({"content": b"\x80garbage\0"}, 400, "JSON"),
    "JSON: empty": ({"content": b""}, 400, "JSON"),
    "header length: beyond the body": (
        {"content": of_x(), "headers": {HEADER_LENGTH: "100000"}}, 400, "header length"
    ),
    "header length: overflows": (
        {"content": of_x(), "headers": {HEADER_LENGTH: str(2**70)}}, 400, "header length"
    ),
    "header length: no number": (
        {"content": of_x(), "headers": {HEADER_LENGTH: "-3"}}, 400, "header"
    ),
    "body: too large": ({"content": bytes((15 << 20) + 1)}, 413, "limit"),
    "body: compressed bomb": (
        {"content": gzip.compress(bytes(64 << 20)), "headers": {"Content-Encoding": "gzip"}},
        413,
        "limit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS)
def test_a_bad_request_is_told_why(up, http, case):
    """Status and reason for whoever asked, and one more in the gateway's counter of that code."""
    how, status, word = REQUESTS[case]
    codes = {400: "invalid_argument", 404: "not_found", 413: "too_large"}
    before = counted(up.url, "roost_gateway_requests_total", code=codes[status])
    request = {"path": INFER, "content": of_x(), **how}
    reply = http.post(request.pop("path"), **request)
    assert_error(reply, status, word)
    assert reply.headers["roost-code"] == codes[status]
    assert counted(up.url, "roost_gateway_requests_total", code=codes[status]) == before + 1


def assert_error(reply: httpx.Response, status: int, word: str) -> None:
    assert reply.status_code == status, reply.text[:500]
    told = reply.json()
    assert set(told) == {"error"}
    assert word in told["error"]
    assert len(told["error"]) < 1000


# --- what cannot be registered -------------------------------------------------------

REGISTRATION = b'{"digest": "%s"}' % OTHER.encode()


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "word"),
    [
        ("PUT", "/v2/repository/models/%2e%2e%2fx/versions/1", REGISTRATION, 400, "'/'"),
        ("PUT", "/v2/repository/models/x%00/versions/1", REGISTRATION, 400, "model name"),
        ("PUT", f"/v2/repository/models/{'x' * 129}/versions/1", REGISTRATION, 400, "model name"),
        ("PUT", "/v2/repository/models/x/versions/0", REGISTRATION, 400, "model version"),
        ("PUT", "/v2/repository/models/x/versions/1", REGISTRATION, 400, "sha256:000"),
        ("PUT", "/v2/repository/models/x/versions/1", b"{" * 50_000, 400, "registration"),
        ("PUT", "/v2/repository/models/x/versions/1", bytes(2 << 20), 413, "limit"),
        ("POST", "/v2/repository/models//versions", REGISTRATION, 404, "Not Found"),
        ("GET", "/v2/models/a%2fb", b"", 400, "'/'"),
        ("GET", "/v2/models/a%0ab/ready", b"", 400, "model name"),
        ("DELETE", "/v2/repository/models/%2e%2e", b"", 400, "model name"),
        ("PUT", "/v2/repository/blobs/%2e%2e", b"x", 400, "digest"),
        ("PUT", "/v2/repository/blobs/sha256:abc", b"x", 400, "digest"),
        ("POST", "/v2/repository/index", b"[" * 50_000, 400, "filter"),
    ],
)  # fmt: skip
def test_a_bad_registration_is_told_why(http, method, path, content, status, word):
    """Nothing is registered by it."""
    before = http.get("/v2/repository/index").json()
    assert_error(http.request(method, path, content=content), status, word)
    assert http.get("/v2/repository/index").json() == before


def test_a_checksum_that_does_not_match_is_refused(http):
    """And the bytes are not kept under the name that they claimed."""
    reply = http.put(f"/v2/repository/blobs/{OTHER}", content=torchscript())
    assert_error(reply, 400, "checksum")
    assert http.head(f"/v2/repository/blobs/{OTHER}").status_code == 404


def bomb() -> bytes:
    """Small, and would unpack to 200 MiB."""
    return archive({**TORCHSCRIPT, "data/0": bytes(200 << 20)}, compression=zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (bomb, "zip bomb"),
        (lambda: b"not a model", "TorchScript"),
        (lambda: b"", "empty"),
        (lambda: torchscript(bytes(5000))[:-50], "truncated"),
    ],
    ids=["zip bomb", "no zip", "empty", "truncated"],
)
def test_a_file_that_is_no_model_cannot_be_registered(http, content, word):
    """The bytes may be there; no version comes to name them."""
    reply = http.put("/v2/repository/models/bad/versions/1", content=put(http, content()))
    assert_error(reply, 400, word)
    assert http.get("/v2/models/bad").status_code == 404


def test_other_bytes_under_an_existing_version_are_refused(http):
    """The version keeps what it was; the same again is no conflict."""
    path = "/v2/repository/models/kept/versions/4"
    first, second = (put(http, torchscript(bytes(n))) for n in (100, 200))
    try:
        assert http.put(path, content=first).status_code == 201
        assert_error(http.put(path, content=second), 409, "immutable")
        assert http.put(path, content=first).status_code == 201
        stored = http.get("/v2/repository/models/kept").json()["versions"]
        assert [each["manifest"]["digest"] for each in stored] == [json.loads(first)["digest"]]
    finally:
        http.delete("/v2/repository/models/kept")


def put(http: httpx.Client, content: bytes) -> bytes:
    """Uploads the file; the body of a registration that names it."""
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    reply = http.put(f"/v2/repository/blobs/{digest}", content=content)
    assert reply.is_success, reply.text
    return json.dumps({"digest": digest}).encode()
