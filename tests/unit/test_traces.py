"""Traces: what is written is read again, and what is no trace is refused with a reason."""

from __future__ import annotations

import gzip

import msgspec
import pytest

from shared.errors import InvalidRequest
from shared.models import Case, Manifest, TensorSpec
from shared.names import ModelId
from shared.traces import (
    Counts,
    Header,
    Trace,
    TracedModel,
    TracedWorker,
    bare,
    member,
    read_trace,
    write_trace,
)


def manifest(name="m", **spec):
    return Manifest(
        name=name, version=1, digest="sha256:" + "0" * 64, size_bytes=9, created_at=0.0, **spec
    )


M = ModelId("m/1")
MODEL = TracedModel(manifest=manifest(), cases=(Case(1, 0, 0.5),), weights_bytes=8)
TRACE = Trace(
    header=Header(began_at=100.0, source="test"),
    models={M: MODEL},
    workers=(TracedWorker(at=0.0, worker="w", device_kind="cpu", budget_bytes=10),),
    counts=(Counts(at=0.0, requests={M: 3}), Counts(at=2.0, requests={M: 4})),
)


def test_what_is_written_is_read(tmp_path):
    """A trace comes back whole, with its length and its sum."""
    write_trace(tmp_path / "t", TRACE)
    read = read_trace(tmp_path / "t")
    assert read == TRACE
    assert (read.duration_s, read.requests) == (3.0, 7)


def test_members_are_appended_and_the_last_word_of_a_model_holds(tmp_path):
    """The recorder appends; what it learns of a model later replaces what it knew."""
    path = tmp_path / "t"
    path.write_bytes(member([TRACE.header, TracedModel(manifest=manifest()), TRACE.counts[1]]))
    with path.open("ab") as file:
        file.write(member([MODEL, TRACE.counts[0]]))
    read = read_trace(path)
    assert read.models[M] == MODEL
    assert [each.at for each in read.counts] == [0.0, 2.0]


def test_a_cut_file_is_whole_but_for_its_end(tmp_path):
    """A writer that was killed within a member loses that one at most, never the rest."""
    path = tmp_path / "t"
    whole = member([TRACE.header, MODEL, TRACE.counts[0]])
    last = member([TRACE.counts[1]])
    for cut in range(3, len(last)):
        path.write_bytes(whole + last[:cut])
        read = read_trace(path)
        assert read.counts[0] == TRACE.counts[0]
        assert len(read.counts) <= 2


def test_a_trace_keeps_no_more_of_a_manifest_than_it_needs():
    """Names of tensors and free parameters stay out of the file."""
    full = manifest(
        inputs=(TensorSpec("secret", "FP32", (1,)),), parameters={"who": "me"}, target_ms=7
    )
    kept = bare(full)
    assert (kept.inputs, kept.parameters, kept.target_ms) == (None, {}, 7)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no gzip"),
        (b"hello", "no gzip"),
        (gzip.compress(b""), "empty"),
        (gzip.compress(b"hello\n"), "line 1"),
        (b"\x1f\x8b\x08garbage garbage", "damaged"),
        (member([MODEL]), "begin with a header"),
        (member([Header(version=2)]), "version 2"),
        (member([Header(interval_s=0.0)]), "interval_s"),
        (member([Header(format="other")]), "begin with a header"),
        (member([TRACE.header, TRACE.counts[0]]), "does not name"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, content, says):
    """The message says what is wrong with the file."""
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=says):
        read_trace(path)


def test_a_missing_file_is_refused(tmp_path):
    """So is one that is not there."""
    with pytest.raises(InvalidRequest, match="cannot read"):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize(
    "lines",
    [
        (Header(interval_s=1e300), MODEL, TRACE.counts[0]),
        (Header(), msgspec.structs.replace(MODEL, load_seconds=-1.0), TRACE.counts[0]),
        (Header(), msgspec.structs.replace(MODEL, weights_bytes=-5), TRACE.counts[0]),
        (Header(), msgspec.structs.replace(MODEL, cases=(Case(0, 0, 0.5),)), TRACE.counts[0]),
        (Header(), MODEL, Counts(at=-5.0, requests={M: 1})),
        (Header(), MODEL, Counts(at=1e18, requests={M: 1})),
        (Header(), MODEL, Counts(at=0.0, requests={M: -1})),
        (Header(), MODEL, Counts(at=0.0, requests={M: 10**15})),
    ],
)
def test_what_cannot_have_been_is_refused(tmp_path, lines):
    """Negative, endless and impossible numbers are an error, not a wrong answer or a crash."""
    path = tmp_path / "t"
    path.write_bytes(member(lines))
    with pytest.raises(InvalidRequest, match=str(path)):
        read_trace(path)
