from __future__ import annotations

import base64
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.overrides import check_unload, decode_load
from shared.errors import InvalidRequest
from shared.models import ModelSpec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = (
    "name", "backend", "platform", "max_batch_size", "input", "output", "dynamic_batching",
    "sequence_batching", "parameters",
)  # fmt: skip


def body(**parameters) -> bytes:
    return json.dumps({"parameters": parameters}).encode()


def test_nothing_is_nothing():
    """An empty body, and the bodies that clients send when they bring nothing along."""
    for said in (b"", b" \n", b"{}", b'{"parameters":{}}'):
        loading = decode_load(said)
        assert (loading.config, loading.files) == (None, ())


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100, 3 << 20])
def test_files_come_out_as_they_went_in(size):
    """Also those longer than one piece, and with escaped slashes."""
    data = bytes(range(256)) * (size // 256) + b"\xff" * (size % 256)
    text = base64.b64encode(data).decode()
    for said in (
        body(config="{}", **{"file:7/model.pt": text}),
        body(config="{}", **{"file:7/model.pt": text}).replace(b"/", b"\\/"),
    ):
        (file,) = decode_load(said).files
        assert file.version == 7
        assert b"".join(file.pieces()) == data


def test_files_are_in_order_and_one_for_each_version():
    """Versions are registered from the lowest."""
    files = {"file:2/model.pt": "", "file:1/model.pt": ""}
    assert [file.version for file in decode_load(body(config="{}", **files)).files] == [1, 2]
    with pytest.raises(InvalidRequest, match="same one"):
        decode_load(body(config="{}", **files, **{"file:2/other.pt": ""}))


def test_a_body_that_would_unpack_to_far_more_memory_is_refused():
    """The limit of a load is for files: neither parameters without number nor a configuration
    of many megabytes is taken apart."""
    many = {f"file:{number}/m.pt": "" for number in range(1, 40_000)}
    with pytest.raises(InvalidRequest, match="too many"):
        decode_load(body(config="{}", **many))
    nested = json.dumps({"sequence_batching": {"x": [[]] * 300_000}})
    with pytest.raises(InvalidRequest, match="config"):
        decode_load(body(config=nested))


@given(st.binary(max_size=60))
def test_bodies_of_any_bytes(data):
    """Read, or refused."""
    for read in (decode_load, check_unload):
        with contextlib.suppress(InvalidRequest):
            read(data)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.text(max_size=12))
def test_configurations_and_files_of_any_content(config, text):
    """A specification that keeps the rules of all, or a refusal."""
    with contextlib.suppress(InvalidRequest):
        loading = decode_load(body(config=json.dumps(config), **{"file:1/model.pt": text}))
        assert loading.config is not None
        assert isinstance(loading.config.spec("m", ModelSpec()), ModelSpec)
        b"".join(loading.files[0].pieces())


@pytest.mark.parametrize("text", [r"\ud800AAA", r"\u00e4AAA", "A===", "====", "A B="])
def test_what_is_no_base64(text):
    """Whatever it is instead, it is refused."""
    said = b'{"parameters":{"config":"{}","file:1/m.pt":"%s"}}' % text.encode()
    with pytest.raises(InvalidRequest):
        b"".join(decode_load(said).files[0].pieces())
