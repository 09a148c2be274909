"""Bounds on what hostile bytes may ask for, each with the input that asks for more: literals of
what fuzzing found, and of what nobody had tried (docs/security.md has the list)."""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from pathlib import Path

import msgspec
import pytest

from services.gateway.core.jobs import decode_ended, decode_job
from services.gateway.core.tally import Tallies, Tally
from services.gateway.grpc import inference_pb2 as pb
from services.gateway.grpc.infer import _NESTED
from services.gateway.grpc.messages import typed_bytes
from services.gateway.grpc.reading import parsed
from services.worker import wire
from shared import archive, control, traces, triton
from shared.aliases import MAX_ALIASES, Alias, Aliases
from shared.aliasfiles import AliasFolder
from shared.cancels import MAX_NOTE, Cancelled, CancelledRequests, encode
from shared.contents import open_contents, open_layout
from shared.errors import Internal, InvalidRequest
from shared.models import Case, Footprint, ModelSpec, Padding, Placement, Profile, TensorSpec
from shared.names import ModelId
from shared.nvmetrics import encoder
from shared.recipes import Piece, Recipe, _check, decode_recipe
from shared.repository import Repository
from shared.storage import LocalStorage
from shared.tenants import Tenants
from tests.fuzz.files import _resealed

DIGEST = "sha256:" + "0" * 64
ROOT = Path(__file__).parents[2]
NO_TEXT = b"\x82\xa4type\xa2\xff\xfe\x01"
"""msgpack of a text that is no UTF-8: an error that is none of msgspec's own."""
NESTED = b"\x81\xa1z" + b"\x91" * 5000
"""Of an unknown field that is nested too deep to be skipped: none of its own either."""
DEEP_JSON = b'{"z":' + b"[" * 5000


# --- descriptions -----------------------------------------------------------------------------

MANY = tuple(TensorSpec(f"x{n}", "FP32", (1,)) for n in range(257))


@pytest.mark.parametrize(
    "fields",
    [
        {"inputs": MANY},
        {"outputs": MANY},
        {"parameters": {f"k{n}": 1 for n in range(257)}},
        {"parameters": {"k": "v" * 20_000}},
        {"parameters": {"k" * 257: "v"}},
        {"parameters": {"k": 2**70}},
        {"max_batch_size": 60_000, "preferred_batch_size": tuple(range(1, 300))},
    ],
)
def test_a_description_has_so_much_of_everything(fields):
    """Every service keeps every manifest in memory."""
    with pytest.raises(InvalidRequest, match=r"at most|than 64 bits"):
        ModelSpec(**fields)


def test_a_placement_has_so_many_labels():
    """And none without end."""
    for selector in ({f"l{n}": "v" for n in range(65)}, {"l": "v" * 300}):
        with pytest.raises(InvalidRequest, match="labels"):
            Placement(worker_selector=selector)
    with pytest.raises(InvalidRequest, match="labels"):
        Placement(spread_by="v" * 300)


def test_padding_names_so_many_inputs():
    """As many as a model may have."""
    with pytest.raises(InvalidRequest, match="more than 256"):
        Padding(inputs={f"x{n}": 0 for n in range(257)}, sizes=(1,))


def test_a_triton_policy_names_so_many_versions():
    """A megabyte of them would be as many messages."""
    config = triton.read_config(
        "version_policy: { specific: { versions: [" + "1," * 1024 + "1] } }"
    )
    with pytest.raises(InvalidRequest, match="more than 1024"):
        triton.chosen_versions(config, [1])


# --- archives ---------------------------------------------------------------------------------


def test_entries_are_counted_before_they_are_read():
    """The directory's end says 5; zipfile would make an object of each that is there: 64 MiB of
    them took half a gigabyte."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *([0] * 9), 3, *([0] * 6)) + b"a/b"
    directory = entry * (archive.MAX_ENTRIES + 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 5, 5, len(directory), 30, 0)
    file = io.BytesIO(b"PK\3\4" + bytes(26) + directory + end)
    with pytest.raises(InvalidRequest, match="more than the 100,000 entries"):
        archive.read_archive(file, "x", "y")


# --- gRPC -------------------------------------------------------------------------------------


def test_a_group_does_not_hide_fields_from_being_counted():
    """The parser skips an unknown group, and reads on: 15 MB of empty inputs took 650 MB."""
    group = b"\xa3\6\xa4\6"
    with pytest.raises(InvalidRequest, match="groups"):
        parsed(pb.ModelInferRequest, group + b"\x2a\0" * 100_000, _NESTED)


def test_parsed_elements_are_counted_as_they_are_in_memory():
    """A byte on the wire may be eight: a request holds what it really takes."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="INT64", shape=[1000])
    tensor.contents.int64_contents.extend([1] * 1000)
    message = pb.ModelInferRequest(model_name="m", inputs=[tensor])
    assert typed_bytes(message) >= 8 * 1000 > len(message.SerializeToString())


# --- messages between services ----------------------------------------------------------------


@pytest.mark.parametrize("data", [NO_TEXT, NESTED, b"\xc1", b""])
def test_what_is_no_message_is_msgspecs_error_or_a_value_error(data):
    """Whoever reads it catches these, and no others."""
    for decode in (control.decode_report, control.decode_assignment):
        with pytest.raises((ValueError, RecursionError)):
            decode(data)
    with pytest.raises(msgspec.MsgspecError):
        wire.unpack_event(data)
    assert Tallies().sum(ModelId("m/1"), [data]) == Tally(batches={})
    for sealed in (data, _resealed(data)):
        assert open_layout(sealed) is None
        assert open_contents(sealed) is None
    assert CancelledRequests().note(data, 0) == ()


def test_control_messages_have_a_size(monkeypatch):
    """Redis would keep half a gigabyte."""
    monkeypatch.setattr(control, "MAX_BYTES", 10)
    for decode in (control.decode_report, control.decode_assignment):
        with pytest.raises(ValueError, match="at most 10 are read"):
            decode(bytes(11))


@pytest.mark.parametrize(
    "fields",
    [{"busy_s": math.nan}, {"load_seconds": math.inf}, {"seconds_per_item": -1.0}],
)
def test_a_report_has_no_impossible_numbers(fields):
    """The placer computes with those of all workers together."""
    model = control.ModelReport(
        model=ModelId("m/1"), tier="disk", phase="absent", bound=False,
        footprint=Footprint(weights_bytes=1), **fields,
    )  # fmt: skip
    report = control.Report(
        worker="w", incarnation="i", seq=1, at=0.0, device_kind="", device_name="",
        budget_bytes=1, used_bytes=0, measured_bytes=0, models=(model,),
    )  # fmt: skip
    with pytest.raises(msgspec.ValidationError):
        control.decode_report(control.encode(report))


def test_a_note_of_hangups_has_so_many():
    """As many as are ever sent in one."""
    told = CancelledRequests()
    assert len(told.note(encode([Cancelled(str(n), 9) for n in range(MAX_NOTE)]), 0)) == MAX_NOTE
    assert told.note(encode([Cancelled("x", 9)] * (MAX_NOTE + 1)), 0) == ()
    assert told.note(encode([Cancelled("x" * 256, 9)]), 0) == ()


@pytest.mark.parametrize(
    "case",
    [{"rows": -1}, {"rows": 1, "seconds": -1.0}, {"rows": 1, "workspace_bytes": 2**60}],
)
def test_measurements_are_possible_ones(case):
    """In a profile that another worker wrote: the placer computes with it."""
    data = msgspec.json.encode({"device_kind": "cpu", "weights_bytes": 1, "cases": [case]})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(data, type=Profile)
    assert Case(1).rows == 1


def test_a_metrics_scrape_survives_any_accept_header():
    """prometheus_client 0.26 compares a version that is none with numbers: a TypeError."""
    for accept in ("text/plain;version=x", "application/openmetrics-text;version=1.x.0"):
        _, content_type = encoder(accept)
        assert content_type.startswith(("text/plain", "application/openmetrics-text"))


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b'{"id":"\xff"}', DEEP_JSON, b""])
def test_documents_that_are_none_are_passed_over(tmp_path, data):
    """Not UTF-8, or nested too deep: each reader knows what to do without."""
    for path in ("aliases/m@3.json", "tenants/t.json", "models/m/1/profiles/x"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    storage = LocalStorage(str(tmp_path), durable=False)
    assert AliasFolder(storage).read("m") == Aliases(3)
    assert Tenants(storage).quotas() == {}
    from shared.profiles import profile_path

    (tmp_path / "models/m/1/profiles/x").rename(tmp_path / profile_path(ModelId("m/1"), "cpu"))
    assert Repository(str(tmp_path)).profiles.get(ModelId("m/1"), "cpu") is None
    head = len(data).to_bytes(4, "big") + data
    for decode in (decode_job, decode_ended):
        with pytest.raises(ValueError):
            decode(head)


@pytest.mark.parametrize("piece", [(DIGEST, -1, 5), (DIGEST, 2**70, 5), ("x" * 81, 0, 5)])
def test_a_recipe_stays_within_its_parts(piece):
    """Its check an enemy can make as well as we."""
    pieces = [Piece(*piece)]
    data = msgspec.json.encode(Recipe(size=5, pieces=pieces, check=_check(pieces)))
    with pytest.raises(Internal, match="damaged"):
        decode_recipe("r", data)


@pytest.mark.parametrize(
    "document",
    [
        Aliases(1, {f"a{n}": Alias({1: 1}) for n in range(MAX_ALIASES + 1)}),
        Aliases(1, {}, tuple(f"a{n}" for n in range(MAX_ALIASES + 1))),
        Aliases(1, {}, ("x" * 300_000,)),
    ],
)
def test_an_alias_document_has_so_much(tmp_path, document):
    """Whoever wrote it."""
    (tmp_path / "aliases").mkdir()
    (tmp_path / "aliases/m@1.json").write_bytes(msgspec.json.encode(document))
    assert AliasFolder(LocalStorage(str(tmp_path), durable=False)).read("m").aliases == {}


@pytest.mark.parametrize(
    "text",
    [b'{"kind":"header","source":"\xff"}\n', b'{"kind":"header","z":' + b"[" * 5000, b"\0"],
)
def test_a_trace_that_is_none_is_refused(tmp_path, text):
    """Not UTF-8, nested too deep."""
    path = tmp_path / "t.gz"
    path.write_bytes(zlib.compress(text + b"\n", 1, 31))
    with pytest.raises(InvalidRequest, match="not of a trace"):
        traces.read_trace(path)


def test_a_trace_unpacks_to_so_much(tmp_path, monkeypatch):
    """In all, and in one line: a kilobyte unpacks to a megabyte."""
    path = tmp_path / "t.gz"
    header = msgspec.json.encode(traces.Header()) + b"\n"
    monkeypatch.setattr(traces, "MAX_LINE_BYTES", 1 << 20)
    path.write_bytes(zlib.compress(header + bytes(8 << 20), 9, 31))
    with pytest.raises(InvalidRequest, match="would unpack to more than"):
        traces.read_trace(path)
    monkeypatch.setattr(traces, "MAX_BYTES", 1000)
    path.write_bytes(zlib.compress(header * 100, 9, 31))
    with pytest.raises(InvalidRequest, match="would unpack to more than"):
        traces.read_trace(path)


# --- the list ---------------------------------------------------------------------------------


def test_the_list_of_limits_names_what_is_there():
    """Each row in docs/security.md names a file, and what the limit is called in it."""
    text = (ROOT / "docs/security.md").read_text()
    section = text[text.index("## Hostile input") : text.index("## Supply chain")]
    rows = re.findall(r"^\|.*\| `([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+) \|$", section, re.MULTILINE)
    assert len(rows) > 40
    for file, listed in rows:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`([\w.]+)`", listed):
            assert name in source, f"{file} has no {name}"
