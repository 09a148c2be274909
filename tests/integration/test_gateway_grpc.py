"""gRPC: Triton's own clients, unmodified, against the gateway: every call they can make."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import numpy as np
import pytest
import tritonclient.grpc as sync
from tritonclient.grpc import aio

from shared.models import ModelSpec, TensorSpec
from shared.names import HEADER_LENGTH
from tests.archives import torchscript
from tests.grpc_rig import given, running_grpc, same

CONFIG = {
    "name": "made",
    "backend": "pytorch",
    "max_batch_size": 8,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}],
}


@pytest.fixture
async def rig(tmp_path):
    async with running_grpc(tmp_path) as made:
        yield made


async def with_client(rig, use, **options):
    """Runs `use(client)`, which blocks, beside the gateway."""

    def run():
        with sync.InferenceServerClient(f"127.0.0.1:{rig.grpc_port}", **options) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def test_every_datatype_and_async_infer(rig):
    """All tensors in one request, some outputs of it, by version, and several calls at once."""

    def use(client):
        same(client.infer("echo", given()))
        wanted = [sync.InferRequestedOutput(name) for name in ("FP16", "BYTES")]
        result = client.infer("echo", given(), model_version="1", outputs=wanted)
        same(result, ("FP16", "BYTES"))
        assert [output.name for output in result.get_response().outputs] == ["FP16", "BYTES"]
        answers = []
        for number in range(8):
            client.async_infer(
                "echo",
                given(),
                lambda result, error: answers.append((result, error)),
                request_id=str(number),
            )
        until_s = time.monotonic() + 20
        while len(answers) < 8 and time.monotonic() < until_s:
            time.sleep(0.01)
        assert [error for _, error in answers] == [None] * 8
        assert {result.get_response().id for result, _ in answers} == {str(n) for n in range(8)}
        for result, _ in answers:
            same(result)

    await with_client(rig, use)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_compressed_requests(rig, algorithm):
    """As gRPC packs them, whole requests of any size."""
    spec = ModelSpec(inputs=(TensorSpec("x", "FP32", (-1,)),), max_batch_size=4)
    await rig.worker.bind(rig.register("wide", spec))

    def use(client):
        for size in (1, 5000, 100_000):
            tensor = sync.InferInput("x", [1, size], "FP32")
            tensor.set_data_from_numpy(np.zeros((1, size), np.float32))
            result = client.infer("wide", [tensor], compression_algorithm=algorithm)
            assert result.as_numpy("x").shape == (1, size)

    await with_client(rig, use)


async def test_what_the_server_tells(rig):
    """Health, metadata, configuration, index, statistics: as plain messages and as JSON."""

    def use(client):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("echo")
        assert not client.is_model_ready("absent")
        server = client.get_server_metadata()
        assert server.name == "roost"
        assert {"statistics", "model_repository"} <= {*server.extensions}
        metadata = client.get_model_metadata("adder", as_json=True)
        assert metadata["versions"] == ["1"]
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "3"]}]
        config = client.get_model_config("echo").config
        assert (config.max_batch_size, config.backend) == (4, "pytorch")
        assert config.input[0].data_type == 1  # TYPE_BOOL
        assert list(config.input[0].dims) == [2]
        index = client.get_model_repository_index().models
        assert {(m.name, m.version, m.state) for m in index} == {
            ("adder", "1", "READY"),
            ("echo", "1", "READY"),
        }
        client.infer("echo", given())
        (one,) = client.get_inference_statistics("echo", "1").model_stats
        assert (one.inference_count, one.inference_stats.success.count) == (1, 1)
        assert one.inference_stats.compute_infer.ns == 2_000_000
        assert len(client.get_inference_statistics().model_stats) == 2

    await with_client(rig, use)


async def test_parameters_priority_and_timeout_reach_the_worker(rig):
    """Custom parameters travel in the body, priority and deadline in the properties."""

    def use(client):
        parameters = {"tenant": "a", "n": 3, "f": 0.5, "b": True}
        client.infer("echo", given(["FP32"]), priority=2, timeout=3_000_000, parameters=parameters)
        client.infer("echo", given(["FP32"]), client_timeout=5)
        with pytest.raises(sync.InferenceServerException, match="DEADLINE_EXCEEDED"):
            client.infer("echo", given(["FP32"]), timeout=1)

    await with_client(rig, use)
    first, second = (delivery.message for delivery in rig.worker.seen)
    assert first.priority == 8
    assert 1000 < first.expiration_ms <= 3000
    told = json.loads(first.body[: first.headers[HEADER_LENGTH]])
    assert told["parameters"].items() >= {"tenant": "a", "n": 3, "f": 0.5, "b": True}.items()
    assert 3000 < second.expiration_ms <= 5100  # gRPC rounds a time-out up


async def test_load_and_unload(rig):
    """An unloaded model cannot be asked until it is loaded; a load may bring its files."""
    files = {f"file:{version}/model.pt": torchscript(bytes([version]) * 64) for version in (1, 2)}

    def use(client):
        client.unload_model("echo")
        assert not client.is_model_ready("echo")
        with pytest.raises(sync.InferenceServerException, match=r"NOT_FOUND.*unloaded"):
            client.infer("echo", given())
        client.load_model("echo")
        same(client.infer("echo", given()))
        client.load_model("made", config=json.dumps(CONFIG), files=files)
        assert list(client.get_model_metadata("made").versions) == ["1", "2"]
        with pytest.raises(sync.InferenceServerException, match=r"INVALID_ARGUMENT.*'config'"):
            client.load_model("made", files=files)
        with pytest.raises(sync.InferenceServerException, match="NOT_FOUND"):
            client.load_model("absent")

    await with_client(rig, use)
    assert rig.repository.versions.manifest("made", 2).max_batch_size == 8
    assert await rig.metric("roost_gateway_held_bytes") == 0


async def test_what_is_not_there_says_so(rig):
    """Streams, shared memory, trace and log settings."""

    def use(client):
        for call in (
            client.get_system_shared_memory_status,
            client.get_cuda_shared_memory_status,
            client.get_trace_settings,
            client.get_log_settings,
        ):
            with pytest.raises(sync.InferenceServerException, match=r"UNIMPLEMENTED.*supported"):
                call()
        told = []
        client.start_stream(lambda result, error: told.append(error))
        with contextlib.suppress(sync.InferenceServerException):  # it may be over already
            client.async_stream_infer("echo", given())
        until_s = time.monotonic() + 20
        while not told and time.monotonic() < until_s:
            time.sleep(0.01)
        client.stop_stream()
        assert "ModelInfer" in str(told[0])

    await with_client(rig, use)


async def test_the_asyncio_client(rig):
    """The same service for the other of Triton's clients."""
    async with aio.InferenceServerClient(f"127.0.0.1:{rig.grpc_port}") as client:
        assert await client.is_server_ready()
        assert await client.is_model_ready("echo", "1")
        assert (await client.get_model_config("echo")).config.max_batch_size == 4
        same(await client.infer("echo", given(), compression_algorithm="gzip"))
        stats = await client.get_inference_statistics("echo")
        assert stats.model_stats[0].inference_count == 1
        with pytest.raises(Exception, match="NOT_FOUND"):
            await client.get_model_metadata("absent")
