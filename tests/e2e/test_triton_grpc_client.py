"""Triton's gRPC client against the whole stack, real engine, broker and store included."""

from __future__ import annotations

import json
import queue

import numpy as np
import pytest

from tests.e2e.running import save_doubler

triton = pytest.importorskip("tritonclient.grpc")
CONFIG = {
    "backend": "pytorch",
    "max_batch_size": 8,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1]}],
}


@pytest.fixture
def client(up):
    """At the address that `roost up` prints."""
    with triton.InferenceServerClient(up.endpoints["grpc"]) as made:
        yield made


def numbers(*values: float):
    given = triton.InferInput("x", [1, len(values)], "FP32")
    given.set_data_from_numpy(np.array([values], np.float32))
    return [given]


def test_a_model_lives_by_tritonclient_alone(client, tmp_path):
    """Loaded from its own bytes, asked, many at once too, counted, and unloaded for all."""
    file = save_doubler(tmp_path).read_bytes()
    client.load_model("called", config=json.dumps(CONFIG), files={"file:1/model.pt": file})
    try:
        got: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        for n in range(20):
            client.async_infer(
                "called", numbers(n, 1), lambda result, error: got.put((result, error))
            )
        answers = [got.get(timeout=60) for _ in range(20)]
        assert [error for _, error in answers] == [None] * 20
        doubled = sorted(result.as_numpy("y").tolist() for result, _ in answers)
        assert doubled == [[[2 * n, 2]] for n in range(20)]
        (stats,) = client.get_inference_statistics("called").model_stats
        assert stats.inference_count == 20
        assert stats.inference_stats.compute_infer.ns > 0
    finally:
        client.unload_model("called")
    with pytest.raises(triton.InferenceServerException, match=r"NOT_FOUND.*unloaded"):
        client.infer("called", numbers(1))
