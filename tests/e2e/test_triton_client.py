"""Triton's client against the whole stack, real engine, broker and store included."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.e2e.running import save_doubler

triton = pytest.importorskip("tritonclient.http")
InferenceServerException = pytest.importorskip("tritonclient.utils").InferenceServerException
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIG = {
    "backend": "pytorch",
    "max_batch_size": 8,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1]}],
}


@pytest.fixture
def client(up):
    with triton.InferenceServerClient(up.url.removeprefix("http://"), concurrency=4) as made:
        yield made


def numbers(*values: float):
    given = triton.InferInput("x", [1, len(values)], "FP32")
    given.set_data_from_numpy(np.array([values], np.float32))
    return [given]


def test_a_model_lives_by_tritonclient_alone(client, tmp_path):
    """Loaded from its own bytes, asked, counted, unloaded for all, and loaded again."""
    file = save_doubler(tmp_path).read_bytes()
    client.load_model("brought", config=json.dumps(CONFIG), files={"file:1/model.pt": file})
    try:
        asked = [client.async_infer("brought", numbers(n, 1)) for n in range(20)]
        got = [each.get_result().as_numpy("y").tolist() for each in asked]
        assert got == [[[2 * n, 2]] for n in range(20)]
        (stats,) = client.get_inference_statistics("brought")["model_stats"]
        assert stats["inference_count"] == 20
        assert 1 <= stats["execution_count"] <= 20
        assert stats["inference_stats"]["compute_infer"]["ns"] > 0
        client.unload_model("brought")
        with pytest.raises(InferenceServerException, match=r"\[404\].*unloaded"):
            client.infer("brought", numbers(1))
        client.load_model("brought")
        assert client.infer("brought", numbers(1)).as_numpy("y").tolist() == [[2]]
    finally:
        client.unload_model("brought")
