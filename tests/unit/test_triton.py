from __future__ import annotations

import sys

import pytest

from shared.errors import InvalidRequest
from shared.models import ModelSpec, TensorSpec
from shared.triton import chosen_versions, read_config, scan, spec_from_config

FULL = """
# A model as Triton's documentation shows it, with fields that mean nothing here.
name: "bert"
platform: "pytorch_libtorch"
max_batch_size: 8
input [
  {
    name: "INPUT__0"
    data_type: TYPE_INT64
    dims: [ -1 ]
    format: FORMAT_NONE
    reshape { shape: [ 1, -1 ] }
  },
  { name: "text" data_type: TYPE_STRING dims: 1 optional: true }
]
output { name: "OUTPUT__0" data_type: TYPE_BF16 dims: [ 2, 3 ] label_filename: "labels.txt" }
instance_group [ { kind: KIND_GPU count: 2 gpus: [ 0, 1 ] } ]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { max_queue_size: 10 }
}
parameters { key: "INFERENCE_MODE" value { string_value: "true" } }
parameters: { key: "X" value: { string_value: "1" } }
version_policy: { latest { num_versions: 2 } }
model_warmup [ { name: "w" batch_size: 1 inputs { key: "a" value { zero_data: true } } } ]
"""


def spec(text: str, name: str = "m") -> ModelSpec:
    return spec_from_config(read_config(text), name)


def test_a_full_configuration():
    """What means something here is taken over, the rest is passed by."""
    assert spec(FULL, "bert") == ModelSpec(
        inputs=(
            TensorSpec("INPUT__0", "INT64", (-1,)),
            TensorSpec("text", "BYTES", (1,), optional=True),
        ),
        outputs=(TensorSpec("OUTPUT__0", "BF16", (2, 3)),),
        max_batch_size=8,
        max_queue_delay_us=100,
        preferred_batch_size=(4, 8),
        default_priority_level=2,
        parameters={"INFERENCE_MODE": "true", "X": "1"},
    )


def test_preferred_sizes_in_any_order_and_no_levels_no_default():
    """Triton asks for neither order, and without levels the default one says nothing."""
    batching = "preferred_batch_size: [ 8, 4, 8 ] default_priority_level: 2"
    found = spec(f"max_batch_size: 8 dynamic_batching {{ {batching} }}")
    assert (found.preferred_batch_size, found.default_priority_level) == ((4, 8), 0)
    with pytest.raises(InvalidRequest, match="preferred_batch_size"):
        spec("max_batch_size: 4 dynamic_batching { preferred_batch_size: 8 }")


def test_unknown_lists_need_no_colon():
    """Lists of messages are skipped as Triton's users write them; texts stay as they are."""
    text = """
    optimization { execution_accelerators { gpu_execution_accelerator [ { name: "x" } ] } }
    instance_group [ { rate_limiter { resources [ { name: "R" count: 4 } ] } } ]  # a [ b
    parameters { key: "list [" value { string_value: 'say \\'a [\\'' } }
    """
    assert spec(text).parameters == {"list [": "say 'a ['"}


def test_an_empty_configuration_says_nothing():
    """Without fields, as without a file, the specification is unknown."""
    assert spec("") == ModelSpec()
    assert spec('name: "m" backend: "pytorch"') == ModelSpec()


@pytest.mark.parametrize(
    "datatype",
    [
        "BOOL",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "FP16",
        "FP32",
        "FP64",
        "BF16",
    ],
)
def test_datatypes(datatype):
    """Each of Triton's datatypes has ours of the same name, but for strings."""
    parsed = spec(f'input {{ name: "x" data_type: TYPE_{datatype} dims: 1 }}')
    assert parsed.inputs == (TensorSpec("x", datatype, (1,)),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('backend: "onnxruntime"', "backend 'onnxruntime'"),
        ('platform: "ensemble"', "platform 'ensemble'"),
        ('platform: "torch_aoti" backend: "pytorch"', "platform 'torch_aoti'"),
        ('name: "other"', "is of model 'other', not of 'm'"),
        ("sequence_batching { max_sequence_idle_microseconds: 5 }", "sequence_batching"),
        ('input { name: "x" dims: 1 }', "'x' has no valid data_type"),
        ('input { name: "x" data_type: TYPE_COMPLEX }', "cannot be read"),
        ("max_batch_size: -1", "max_batch_size"),
        ("max_batch_size: many", "cannot be read"),
        ("input {", "cannot be read"),
        ("x { " * 5000, "cannot be read"),
        ('input { name: "x" data_type: TYPE_FP32 } ' * 2, "same name"),
    ],
)
def test_what_cannot_be_served_is_refused(text, reason):
    """Another backend, or a configuration that cannot be meant, is refused with its reason."""
    with pytest.raises(InvalidRequest) as caught:
        spec(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("", [1, 3, 7]),
        ("version_policy { all {} }", [1, 3, 7]),
        ("version_policy { latest { num_versions: 2 } }", [3, 7]),
        ("version_policy { latest {} }", [7]),
        ("version_policy { latest { num_versions: 9 } }", [1, 3, 7]),
        ("version_policy { specific { versions: [7, 1] } }", [1, 7]),
    ],
)
def test_version_policy(text, chosen):
    """The policy chooses; without one everything is imported."""
    assert chosen_versions(read_config(text), [1, 3, 7]) == chosen
    assert chosen_versions(None, [1, 3, 7]) == [1, 3, 7]


def test_without_protobuf_the_extra_is_named(monkeypatch):
    """Whoever lacks protobuf hears what to install."""
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with pytest.raises(InvalidRequest, match=r"roost\[triton\]"):
        read_config("")


def tree(tmp_path, **files):
    for path, text in files.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return {found.label: found.content for found in scan(str(tmp_path))}


def test_scan(tmp_path):
    """Versions are the folders named by a number; each trouble has its own label."""
    (tmp_path / "empty").mkdir()
    found = tree(
        tmp_path,
        **{
            "README.md": "not a model",
            ".git/1/model.pt": "",
            "plain/1/model.pt": "one",
            "plain/2/model.pt": "two",
            "plain/0/model.pt": "",
            "plain/02/model.pt": "",
            "plain/notes/x": "",
            "gap/1/other": "",
            "asked/1/model.pt": "",
            "asked/config.pbtxt": "version_policy { specific { versions: [1, 5] } }",
            "path/1/model.pt": "",
            "path/config.pbtxt": 'default_model_filename: "../../plain/1/model.pt"',
            "huge/1/model.pt": "",
            "huge/config.pbtxt": "#" * (1 << 20) + "\n",
        },
    )
    refused = {label for label, content in found.items() if isinstance(content, InvalidRequest)}
    assert refused == {"empty", "gap/1", "asked/5", "path", "huge"}
    assert set(found) - refused == {"plain/1", "plain/2", "asked/1"}
    assert (found["plain/2"].name, found["plain/2"].version) == ("plain", 2)
    assert found["plain/2"].spec == ModelSpec()
    with found["plain/2"].open() as file:
        assert file.read() == b"two"


def test_scan_of_nothing(tmp_path):
    """A directory that is not there is refused."""
    (tmp_path / "file").write_text("")
    for path in ("missing", "file"):
        with pytest.raises(InvalidRequest, match="not a directory"):
            list(scan(str(tmp_path / path)))
    with pytest.raises(InvalidRequest, match="cannot be opened"):
        list(scan("nosuch://x"))
