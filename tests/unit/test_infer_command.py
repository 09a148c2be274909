"""`roost infer`: how a binary answer is shown."""

import numpy as np

from roost.commands.infer import readable
from shared import v2
from shared.tensors import from_numpy


def test_raw_tensors_become_what_a_person_can_read() -> None:
    """Half floats are numbers, bytes are text, and what is not UTF-8 is no reason to fail."""
    tensors = [
        from_numpy("half", np.array([[1.5, -2.0]], np.float16)),
        from_numpy("brain", np.array([0.5], np.float32), "BF16"),
        from_numpy("text", np.array([b"ja", b"\xff!"], object)),
        from_numpy("flag", np.array([True, False])),
    ]
    asked = v2.InferRequest(binary_default=True)
    body, length = v2.encode_response("m", 2, "r7", tensors, asked)
    assert length is not None
    assert readable(body, length) == {
        "model_name": "m",
        "model_version": "2",
        "id": "r7",
        "outputs": [
            {"name": "half", "datatype": "FP16", "shape": [1, 2], "data": [1.5, -2.0]},
            {"name": "brain", "datatype": "BF16", "shape": [1], "data": [0.5]},
            {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["ja", "\ufffd!"]},
            {"name": "flag", "datatype": "BOOL", "shape": [2], "data": [True, False]},
        ],
    }
