"""Triton's own Python clients, unmodified, against the gateway: every call they can make."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shared.control import ModelReport, Report
from shared.models import Footprint, ModelSpec, TensorSpec
from shared.names import HEADER_BATCH, HEADER_COMPUTE_US
from shared.store.memory import MemoryStore
from tests.archives import torchscript
from tests.gateway_rig import JSON_BODY, SPEC, another_gateway, echo, reply_to, running

sync = pytest.importorskip("tritonclient.http")
aio = pytest.importorskip("tritonclient.http.aio")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ARRAYS = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[1, 255]], np.uint8),
    "INT64": np.array([[-1, 2**62]], np.int64),
    "FP16": np.array([[0.5, -2]], np.float16),
    "FP32": np.array([[0.5, -2]], np.float32),
    "FP64": np.array([[0.5, -2]], np.float64),
    "BYTES": np.array([[b"ab", "ä€".encode()]], np.object_),
}
ECHO = ModelSpec(
    inputs=tuple(TensorSpec(name, name, (2,), optional=True) for name in ARRAYS),
    max_batch_size=4,
)


@pytest.fixture
async def rig(tmp_path):
    async with running(tmp_path, load_limit_bytes=200_000) as made:
        made.worker.script = echo
        await made.worker.bind(made.register("echo", ECHO))
        yield made


async def with_client(rig, use, **options):
    """Runs `use(client)`, which blocks, beside the gateway."""

    def run():
        with sync.InferenceServerClient(f"127.0.0.1:{rig.port}", **options) as client:
            return use(client)

    return await asyncio.to_thread(run)


def given(kind=sync, *, binary=True, names=tuple(ARRAYS)):
    tensors = []
    for name in names:
        tensor = kind.InferInput(name, [1, 2], name)
        tensor.set_data_from_numpy(ARRAYS[name], binary_data=binary)
        tensors.append(tensor)
    return tensors


def same(result, names=tuple(ARRAYS)):
    for name in names:
        got = result.as_numpy(name)
        want = ARRAYS[name]
        if name == "BYTES":
            got = np.array([[x if isinstance(x, bytes) else x.encode() for x in got[0]]], object)
        assert got.tolist() == want.tolist(), name


JSONABLE = tuple(name for name in ARRAYS if name != "FP16")  # the protocol: not in JSON


async def test_every_datatype_in_binary_and_in_json(rig):
    """Each way in with each way out, mixed in one request too, and `async_infer`."""

    def use(client):
        same(client.infer("echo", given()))
        same(client.infer("echo", given(), model_version="1"))
        for binary_in in (True, False):
            for binary_out in (True, False):
                outputs = [
                    sync.InferRequestedOutput(name, binary_data=binary_out) for name in JSONABLE
                ]
                inputs = given(binary=binary_in, names=JSONABLE)
                same(client.infer("echo", inputs, outputs=outputs), JSONABLE)
        mixed_in = [*given(names=("FP32", "FP16")), *given(binary=False, names=("INT64", "BYTES"))]
        mixed_out = [
            sync.InferRequestedOutput("FP32", binary_data=False),
            sync.InferRequestedOutput("FP16", binary_data=True),
            sync.InferRequestedOutput("BYTES", binary_data=True),
        ]
        same(client.infer("echo", mixed_in, outputs=mixed_out), ("FP32", "FP16", "BYTES"))
        pending = [client.async_infer("echo", given(), request_id=str(n)) for n in range(8)]
        for number, each in enumerate(pending):
            result = each.get_result(timeout=20)
            assert result.get_response()["id"] == str(number)
            same(result)

    await with_client(rig, use, concurrency=4)


async def test_compression_both_ways(rig):
    """A request and its answer, each as gzip or deflate; the answer only when asked for."""
    spec = ModelSpec(inputs=(TensorSpec("x", "FP32", (-1,)),), max_batch_size=4)
    await rig.worker.bind(rig.register("wide", spec))
    x = np.zeros((1, 5000), np.float32)

    def use(client):
        for algorithm in ("gzip", "deflate"):
            tensor = sync.InferInput("x", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x)
            result = client.infer(
                "wide",
                [tensor],
                request_compression_algorithm=algorithm,
                response_compression_algorithm=algorithm,
            )
            assert result.as_numpy("x").shape == (1, 5000)

    await with_client(rig, use)
    body = {"inputs": [{"name": "x", "shape": [1, 5000], "datatype": "FP32", "data": [0.0] * 5000}]}
    raw = await rig.infer(body, "wide", headers={"accept-encoding": "gzip"})
    assert raw.headers["content-encoding"] == "gzip"
    assert int(raw.headers["content-length"]) < 1000
    assert len(raw.content) > 10_000
    for offer in ("gzip, deflate, br", "identity", "br", "gzip;q=0", ""):
        plain = await rig.infer(body, "wide", headers={"accept-encoding": offer})
        assert "content-encoding" not in plain.headers, offer
    errors = await rig.infer(b"{", "wide", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in errors.headers


async def test_a_compressed_request_is_measured_unpacked(tmp_path):
    """The limit is of the bytes that it unpacks to."""
    async with running(tmp_path, request_limit_bytes=100_000) as rig:
        bomb = gzip.compress(json.dumps(JSON_BODY).encode() + b" " * 100_000)
        answer = await rig.infer(bomb, headers={"content-encoding": "gzip"})
        assert answer.status_code == 413
        assert rig.worker.seen == []


async def test_parameters_priority_and_timeout_reach_the_worker(rig):
    """Custom parameters travel in the body, priority and deadline in the properties."""

    def use(client):
        client.infer(
            "echo",
            given(names=("FP32",)),
            priority=2,
            timeout=3_000_000,
            parameters={"tenant": "a", "n": 3, "f": 0.5, "b": True},
        )
        with pytest.raises(Exception, match=r"\[504\]"):
            client.infer("echo", given(names=("FP32",)), timeout=1)

    await with_client(rig, use)
    message = rig.worker.seen[0].message
    assert message.priority == 8
    assert message.expiration_ms <= 3000
    told = json.loads(message.body[: message.headers["Inference-Header-Content-Length"]])
    assert told["parameters"].items() >= {"tenant": "a", "n": 3, "f": 0.5, "b": True}.items()


async def test_errors_are_read_by_the_client(rig):
    """Status and message, of inference and of everything else."""

    def use(client):
        for call, words in (
            (lambda: client.infer("absent", given()), r"\[404\].*not registered"),
            (lambda: client.infer("echo", given(names=("FP32",)) * 2), r"\[400\].*more than once"),
            (lambda: client.get_model_metadata("absent"), r"\[404\].*not registered"),
            (lambda: client.load_model("absent"), r"\[404\].*not registered"),
            (lambda: client.unload_model("absent"), r"\[404\].*not registered"),
            (lambda: client.get_inference_statistics("absent"), r"\[404\].*not registered"),
            (client.get_trace_settings, r"\[404\]"),
            (client.get_log_settings, r"\[404\]"),
        ):
            with pytest.raises(Exception, match=words):
                call()

    await with_client(rig, use)


async def test_the_asyncio_client(rig):
    """Which says that it takes gzip with every call, and unpacks only inference."""
    async with aio.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("echo")
        server = await client.get_server_metadata()
        assert {"statistics", "model_repository", "binary_tensor_data"} <= {*server["extensions"]}
        assert (await client.get_model_metadata("echo"))["name"] == "echo"
        assert (await client.get_model_config("echo"))["max_batch_size"] == 4
        assert len(await client.get_model_repository_index()) == 2
        same(await client.infer("echo", given(aio)))
        for algorithm in ("gzip", "deflate"):
            result = await client.infer(
                "echo",
                given(aio),
                request_compression_algorithm=algorithm,
                response_compression_algorithm=algorithm,
            )
            same(result)
        stats = await client.get_inference_statistics("echo")
        assert stats["model_stats"][0]["inference_count"] == 3
        await client.unload_model("echo")
        # Not its is_model_ready: on a "no" it leaves the body unread, and Python warns of that.
        assert (await rig.http.get("/v2/models/echo/ready")).status_code == 404
        with pytest.raises(Exception, match=r"\[404\].*unloaded"):
            await client.infer("echo", given(aio))
        await client.load_model("echo")
        same(await client.infer("echo", given(aio)))


# --- load and unload -----------------------------------------------------------------------


async def test_an_unloaded_model_is_unavailable_everywhere_until_it_is_loaded(rig):
    """Here, on another gateway, and on one that starts later; the index says so."""
    async with another_gateway(rig) as other:
        ask = {"content": json.dumps(JSON_BODY)}
        assert (await other.post("/v2/models/adder/infer", **ask)).status_code != 404
        await with_client(rig, lambda client: client.unload_model("adder"))

        async def refuses():
            return (await other.post("/v2/models/adder/infer", **ask)).status_code == 404

        async with asyncio.timeout(10):
            while not await refuses():
                await asyncio.sleep(0.01)
    async with another_gateway(rig) as restarted:
        answer = await restarted.post("/v2/models/adder/infer", **ask)
        assert answer.status_code == 404
        assert "unloaded" in answer.json()["error"]
        assert (await restarted.get("/v2/models/adder/ready")).status_code == 404

        def look(client):
            states = {m["name"]: (m["state"], m["reason"]) for m in index_of(client)}
            assert states["adder"] == ("UNAVAILABLE", "unloaded")
            assert states["echo"][0] == "READY"

        await with_client(rig, look)
        detail = (await rig.http.get("/v2/repository/models/adder")).json()
        assert detail["versions"][0]["state"] == "UNAVAILABLE"
        await with_client(rig, lambda client: client.load_model("adder"))
        assert (await restarted.get("/v2/models/adder/ready")).status_code == 200
        assert (await rig.http.get("/v2/models/adder/ready")).status_code == 200


def index_of(client):
    return client.get_model_repository_index()


async def test_a_model_that_goes_takes_its_unloading_along(rig):
    """Whoever registers the name anew means to use it."""
    assert (await rig.http.post("/v2/repository/models/adder/unload")).status_code == 200
    assert (await rig.http.delete("/v2/repository/models/adder")).status_code == 204
    rig.register("adder")
    assert (await rig.http.get("/v2/models/adder/ready")).status_code == 200


CONFIG = {
    "name": "made",
    "backend": "pytorch",
    "max_batch_size": 8,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["3"]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [3]}],
    "dynamic_batching": {"max_queue_delay_microseconds": "200", "unknown_to_us": {}},
}


async def test_load_registers_what_it_brings_along(rig):
    """Files and a configuration become versions; the same again changes nothing."""
    files = {f"file:{version}/model.pt": torchscript(bytes([version]) * 64) for version in (1, 2)}

    def load(client):
        client.load_model("made", config=json.dumps(CONFIG), files=files)
        client.load_model("made", config=json.dumps(CONFIG), files=files)
        metadata = client.get_model_metadata("made")
        assert metadata["versions"] == ["1", "2"]
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]

    await with_client(rig, load)
    manifest = rig.repository.versions.manifest("made", 2)
    assert (manifest.max_queue_delay_us, manifest.max_batch_size) == (200, 8)
    path = rig.repository.files.path(manifest.digest, str(rig.root / "cache"))
    assert await asyncio.to_thread(Path(path).read_bytes) == files["file:2/model.pt"]


async def test_load_with_a_configuration_alone(rig):
    """Its own one changes nothing; another one makes the next version, of the same file, which
    keeps what a Triton configuration cannot say."""
    spec = ModelSpec(
        inputs=SPEC.inputs, max_batch_size=8, target_ms=7.0, parameters={"n": 3, "s": "x"}
    )
    rig.register("tuned", spec)

    def use(client):
        config = client.get_model_config("tuned")
        client.load_model("tuned", config=json.dumps(config))
        assert client.get_model_metadata("tuned")["versions"] == ["1"]
        client.load_model("tuned", config=json.dumps(config | {"max_batch_size": 4}))
        assert client.get_model_metadata("tuned")["versions"] == ["1", "2"]

    await with_client(rig, use)
    old, new = (rig.repository.versions.manifest("tuned", number) for number in (1, 2))
    assert (new.max_batch_size, new.target_ms, new.parameters) == (4, 7.0, {"n": 3, "s": "x"})
    assert new.digest == old.digest


@pytest.mark.parametrize(
    ("parameters", "status", "word"),
    [
        ({"config": 1}, 400, "valid"),
        ({"config": "{"}, 400, "valid"),
        ({"config": json.dumps(CONFIG | {"name": "other"})}, 400, "other"),
        ({"config": json.dumps(CONFIG | {"backend": "onnxruntime"})}, 400, "onnxruntime"),
        ({"config": json.dumps(CONFIG | {"sequence_batching": {}})}, 400, "sequence"),
        ({"config": json.dumps(CONFIG | {"platform": "tensorrt_plan"})}, 400, "tensorrt_plan"),
        (
            {
                "config": json.dumps(
                    CONFIG | {"input": [{"name": "x", "data_type": "TYPE_WISH", "dims": [3]}]}
                )
            },
            400,
            "TYPE_WISH",
        ),
        (
            {
                "config": json.dumps(
                    CONFIG
                    | {
                        "input": [
                            {
                                "name": "x",
                                "data_type": "TYPE_FP32",
                                "dims": [3],
                                "reshape": {"shape": []},
                            }
                        ]
                    }
                )
            },
            400,
            "reshape",
        ),
        ({"config": json.dumps(CONFIG)}, 404, "not registered"),
        ({"config": json.dumps(CONFIG), "file:1/model.pt": "@@@@"}, 400, "base64"),
        ({"config": json.dumps(CONFIG), "file:1/model.pt": "AAA"}, 400, "base64"),
        ({"config": json.dumps(CONFIG), "file:1/model.pt": 7}, 400, "base64"),
        ({"config": json.dumps(CONFIG), "file:1/model.pt": "AAAA"}, 400, "version 1"),
        ({"config": json.dumps(CONFIG), "file:0/model.pt": "AAAA"}, 400, "version"),
        ({"config": json.dumps(CONFIG), "file:1/../x": "AAAA"}, 400, "understood"),
        ({"file:1/model.pt": base64.b64encode(torchscript()).decode()}, 400, "config"),
        ({"wish": 1}, 400, "wish"),
    ],
)
async def test_loads_that_cannot_be(rig, parameters, status, word):
    """What is wrong is said, and nothing is registered."""
    answer = await rig.http.post("/v2/repository/models/made/load", json={"parameters": parameters})
    assert (answer.status_code, word in answer.json()["error"]) == (status, True), answer.text
    assert rig.repository.versions.numbers("made") == []
    assert await rig.metric("roost_gateway_held_bytes") == 0


async def test_a_load_that_is_too_large(rig):
    """413, and the room in memory is given back."""
    body = {"parameters": {"config": json.dumps(CONFIG), "file:1/model.pt": "A" * 300_000}}
    answer = await rig.http.post("/v2/repository/models/made/load", json=body)
    assert answer.status_code == 413
    assert await rig.metric("roost_gateway_held_bytes") == 0


async def test_a_version_cannot_be_loaded_over(rig):
    """Versions are immutable, also for a client that expects otherwise: it is told."""
    body = {"parameters": {"config": json.dumps(CONFIG), "file:1/model.pt": ""}}
    for weights, status in ((b"1" * 64, 200), (b"2" * 64, 409)):
        body["parameters"]["file:1/model.pt"] = base64.b64encode(torchscript(weights)).decode()
        answer = await rig.http.post("/v2/repository/models/made/load", json=body)
        assert answer.status_code == status
    assert "immutable" in answer.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{}", b'{"parameters":{"unload_dependents":true}}'])
async def test_unload_bodies(rig, body):
    """Triton's clients always say whether dependents go too; there are none here."""
    answer = await rig.http.post("/v2/repository/models/adder/unload", content=body)
    assert answer.status_code == 200
    again = await rig.http.post("/v2/repository/models/adder/unload", content=b'{"parameters":1}')
    assert again.status_code == 400


# --- statistics ----------------------------------------------------------------------------

DURATIONS = {
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output",
    "cache_hit", "cache_miss",
}  # fmt: skip


async def test_statistics_have_every_key_also_of_a_model_never_asked(rig):
    """Clients read them unchecked."""

    def use(client):
        stats = client.get_inference_statistics()["model_stats"]
        assert [each["name"] for each in stats] == ["adder", "echo"]
        (one,) = client.get_inference_statistics("adder", "1")["model_stats"]
        assert one["inference_stats"].keys() == DURATIONS
        assert all(each == {"count": 0, "ns": 0} for each in one["inference_stats"].values())
        assert (one["version"], one["inference_count"], one["execution_count"]) == ("1", 0, 0)
        assert (one["last_inference"], one["batch_stats"], one["memory_usage"]) == (0, [], [])

    await with_client(rig, use)


async def test_statistics_count_batches_and_failures_over_all_gateways(rig):
    """Two requests of two rows that ran in one batch of four are one execution."""

    async def in_one_batch(worker, delivery):
        message = reply_to(delivery)
        headers = {**message.headers, HEADER_BATCH: 4, HEADER_COMPUTE_US: 3000}
        await worker.reply(delivery, msgspec.structs.replace(message, headers=headers))
        await delivery.ack()

    rig.worker.script = in_one_batch
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [0.0] * 6}]}
    async with another_gateway(rig) as other:
        assert (await rig.infer(body)).status_code == 200
        assert (await other.post("/v2/models/adder/infer", json=body)).status_code == 200
        assert (await other.post("/v2/models/adder/infer", json={})).status_code == 400

        async def summed():
            (one,) = (await rig.http.get("/v2/models/adder/stats")).json()["model_stats"]
            return one if one["inference_stats"]["success"]["count"] == 2 else None

        async with asyncio.timeout(10):
            while (one := await summed()) is None:
                await asyncio.sleep(0.05)
    assert (one["inference_count"], one["execution_count"]) == (4, 1)
    stats = one["inference_stats"]
    assert stats["fail"]["count"] == 1
    assert stats["compute_infer"] == {"count": 2, "ns": 6_000_000}
    assert stats["success"]["ns"] >= stats["queue"]["ns"] >= 0
    (batch,) = one["batch_stats"]
    assert (batch["batch_size"], batch["compute_infer"]) == (4, {"count": 1, "ns": 3_000_000})
    assert one["last_inference"] > 1_600_000_000_000


async def test_statistics_tell_the_memory_that_workers_report(rig):
    """All workers' devices together, by kind of memory."""
    store = MemoryStore(rig.state)
    for worker in ("w1", "w2"):
        model = ModelReport(
            model="adder/1", tier="device", phase="ready", bound=True, footprint=Footprint(90, 10)
        )
        report = Report(
            worker=worker, incarnation="i", seq=1, at=0.0, device_kind="cuda:X", device_name="X",
            budget_bytes=1000, used_bytes=100, measured_bytes=100, models=(model,),
        )  # fmt: skip
        await store.put_report(report, 60)
    (one,) = (await rig.http.get("/v2/models/adder/stats")).json()["model_stats"]
    assert one["memory_usage"] == [{"type": "GPU", "id": 0, "byte_size": 200}]


async def test_statistics_without_a_store_are_this_gateways(rig):
    """Better than nothing."""
    rig.state.reachable = False
    await rig.infer(name="echo", body={"inputs": [
        {"name": "FP32", "datatype": "FP32", "shape": [1, 2], "data": [0.5, -2]}
    ]})  # fmt: skip
    (one,) = (await rig.http.get("/v2/models/echo/stats")).json()["model_stats"]
    assert one["inference_count"] == 1
