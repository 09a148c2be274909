"""What tests of gRPC have in common: tensors, a request, and how it is refused."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from shared.models import ModelSpec, TensorSpec
from tests.gateway_rig import Rig, echo, running

Code = grpc.StatusCode
ARRAYS = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[1, 255]], np.uint8),
    "INT64": np.array([[-1, 2**62]], np.int64),
    "FP16": np.array([[0.5, -2]], np.float16),
    "BF16": np.array([[0.5, -2]], ml_dtypes.bfloat16),
    "FP32": np.array([[0.5, -2]], np.float32),
    "FP64": np.array([[0.5, -2]], np.float64),
    "BYTES": np.array([[b"ab", "ä€".encode()]], np.object_),
}
ECHO = ModelSpec(
    inputs=tuple(TensorSpec(name, name, (2,), optional=True) for name in ARRAYS),
    max_batch_size=4,
)
ADDER = service_pb2.ModelInferRequest(
    model_name="adder",
    id="r1",
    inputs=[
        service_pb2.ModelInferRequest.InferInputTensor(
            name="x",
            datatype="FP32",
            shape=[1, 3],
            contents=service_pb2.InferTensorContents(fp32_contents=[1, 2, 3]),
        )
    ],
)


@contextlib.asynccontextmanager
async def running_grpc(tmp_path) -> AsyncIterator[Rig]:
    """A gateway with gRPC, whose model `echo` gives back what it gets."""
    async with running(tmp_path, grpc_port=0, body_timeout_s=0.5) as made:
        made.worker.script = echo
        await made.worker.bind(made.register("echo", ECHO))
        yield made


def given(names=tuple(ARRAYS)):
    tensors = []
    for name in names:
        tensor = triton.InferInput(name, [1, 2], name)
        tensor.set_data_from_numpy(ARRAYS[name])
        tensors.append(tensor)
    return tensors


def same(result, names=tuple(ARRAYS)):
    for name in names:
        assert result.as_numpy(name).tolist() == ARRAYS[name].tolist(), name


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def trailing(error: grpc.aio.AioRpcError) -> dict:
    return dict(error.trailing_metadata() or ())
