"""Traces: what was asked of a fleet, and enough of its models to ask again in a simulator.

One gzip file of JSON lines; the first is a `Header`, any number of the others follow in any order
that names a model before it is counted. A line that says more of a model replaces what was said
of it. The file is written in gzip members of some seconds each, so it can be read while it is
written, and one whose writer was killed is whole but for its last seconds.

Counts are requests that came, per model and interval, of those models that were asked; nothing
tells one request from another. A second of the trace is `Counts.at` of `began_at`.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec

from shared.errors import InvalidRequest
from shared.models import Case, Manifest
from shared.names import ModelId

FORMAT: Final = "roost-trace"
VERSION: Final = 1
_MOST_INTERVALS: Final = 31_622_400
"""A year of seconds."""
_MOST_REQUESTS: Final = 10**9
"""Of one model in one interval."""
MAX_BYTES: Final = 4 << 30
"""Of all lines: some 40 million counts."""
MAX_LINE_BYTES: Final = 64 << 20
_STEP_BYTES: Final = 1 << 20

_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Bytes = Annotated[int, msgspec.Meta(ge=0)]


class Header(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="header"):
    format: str = FORMAT
    version: int = VERSION
    interval_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 1.0
    """Length of the intervals in which requests are counted."""
    began_at: float = 0.0
    """Unix time; 0: made, not recorded."""
    source: str = ""
    """Who wrote it, for people."""


class TracedModel(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="model"):
    """One model as it was known when it was first asked, or later. What only its callers need
    (names of tensors, padding, free parameters) is left out of the manifest."""

    manifest: Manifest
    device_kind: str = ""
    """On which this was measured."""
    cases: tuple[Case, ...] = ()
    """Seconds by batch size. Empty: nothing had been measured."""
    weights_bytes: _Bytes = 0
    load_seconds: _Seconds = 0.0
    """From the disk to the device; 0: not known."""
    swap_seconds: _Seconds = 0.0
    """From the host's memory to the device; 0: not known."""
    architecture: str = ""

    @property
    def id(self) -> ModelId:
        return self.manifest.id


class TracedWorker(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="worker"):
    """One worker as it was seen at `at` seconds."""

    at: float
    worker: str
    device_kind: str
    budget_bytes: _Bytes
    host_bytes: _Bytes = 0
    labels: dict[str, str] = {}


class Counts(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="counts"):
    """Requests by model in the interval that begins at `at` seconds."""

    at: _Seconds
    requests: dict[ModelId, Annotated[int, msgspec.Meta(ge=0, le=_MOST_REQUESTS)]]


Line = Header | TracedModel | TracedWorker | Counts


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """A trace, read whole."""

    header: Header
    models: dict[ModelId, TracedModel]
    workers: tuple[TracedWorker, ...] = ()
    counts: tuple[Counts, ...] = ()
    """Ascending by `at`."""

    @property
    def duration_s(self) -> float:
        return self.counts[-1].at + self.header.interval_s if self.counts else 0.0

    @property
    def requests(self) -> int:
        return sum(sum(counts.requests.values()) for counts in self.counts)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Line)


def member(lines: Iterable[Line]) -> bytes:
    """Some lines as one gzip member, to be appended to the file."""
    text = b"".join(_encoder.encode(line) + b"\n" for line in lines)
    return gzip.compress(text, 6, mtime=0)


def bare(manifest: Manifest) -> Manifest:
    """What of a manifest a trace keeps."""
    return msgspec.structs.replace(manifest, inputs=None, outputs=None, padding=None, parameters={})


def write_trace(path: Path, trace: Trace) -> None:
    """In place of what is there. Raises `OSError`."""
    lines: list[Line] = [trace.header, *trace.models.values(), *trace.workers, *trace.counts]
    path.write_bytes(member(lines))


def read_trace(path: Path) -> Trace:
    """Raises `InvalidRequest` when the file is not there, is no trace, or of a newer version."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read the trace {path}: {error.strerror}") from error
    header: Header | None = None
    models: dict[ModelId, TracedModel] = {}
    workers: list[TracedWorker] = []
    counts: list[Counts] = []
    for number, text in enumerate(_lines(path, data), start=1):
        try:
            line = _decoder.decode(text)
        except (ValueError, RecursionError, InvalidRequest) as error:
            said = str(error)[:300]
            raise InvalidRequest(f"{path} line {number} is not of a trace: {said}") from error
        if header is None:
            if not isinstance(line, Header) or line.format != FORMAT:
                raise InvalidRequest(f"{path} is not a trace: it does not begin with a header")
            if line.version != VERSION:
                raise InvalidRequest(
                    f"{path} is a trace of version {line.version}; "
                    f"this program reads version {VERSION}"
                )
            header = line
        elif isinstance(line, TracedModel):
            if any(case.rows < 1 or case.seconds < 0 for case in line.cases):
                raise InvalidRequest(f"{path} line {number}: {line.id} has an impossible batch")
            models[line.id] = line
        elif isinstance(line, TracedWorker):
            workers.append(line)
        elif isinstance(line, Counts):
            if line.at / header.interval_s >= _MOST_INTERVALS:
                raise InvalidRequest(f"{path} line {number}: {line.at:g} s is too late in a trace")
            counts.append(line)
    if header is None:
        raise InvalidRequest(f"{path} is not a trace: it is empty")
    unknown = {name for each in counts for name in each.requests} - models.keys()
    if unknown:
        raise InvalidRequest(f"{path} counts requests of {min(unknown)}, which it does not name")
    counts.sort(key=lambda each: each.at)
    return Trace(header=header, models=models, workers=tuple(workers), counts=tuple(counts))


def _lines(path: Path, data: bytes) -> Iterator[bytes]:
    """Whole lines; a last member that was cut off is left out."""
    if data[:2] != b"\x1f\x8b":
        raise InvalidRequest(f"{path} is not a trace: it is no gzip file")
    left = MAX_BYTES
    while data:
        inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        begun = b""
        while data and not inflate.eof:
            try:
                begun += inflate.decompress(data, _STEP_BYTES)
            except zlib.error as error:
                raise InvalidRequest(f"{path} is damaged: {error}") from error
            data = inflate.unconsumed_tail
            *lines, begun = begun.split(b"\n")
            left -= sum(map(len, lines))
            if left < 0 or len(begun) > MAX_LINE_BYTES:
                raise InvalidRequest(
                    f"{path} would unpack to more than {MAX_BYTES:,} bytes, or {MAX_LINE_BYTES:,} "
                    "in one line"
                )
            yield from lines
        if inflate.eof and begun:  # else the writer was cut off here, or still writes
            yield begun
        data = inflate.unused_data
