"""Targets: what lies in files. Archives that somebody uploads, descriptions, and what the
repository keeps (a bucket that others write to as well)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, cast

import msgspec

from services.gateway.aliases import decode_wish, parse_revision, parse_wait
from services.gateway.core.jobkeys import decode_claim
from services.gateway.core.jobs import JobNotFound, decode_ended, decode_job, decode_note
from services.gateway.jobs.files import Broken
from services.gateway.overrides import check_unload, decode_load
from services.gateway.registry import decode_registration
from services.worker.journal import Journal
from shared import triton
from shared.aliases import Alias, Aliases
from shared.aliasfiles import AliasFolder
from shared.auth import Gate
from shared.blobs import check_digest
from shared.contents import open_contents, open_layout, seal
from shared.errors import Internal, InvalidRequest, RoostError
from shared.keys import Keys, Table, new_key
from shared.layout import Block, Layout
from shared.layout.pickled import read_pickle
from shared.layout.records import Unreadable
from shared.layout.torchscript import read_layout
from shared.manifests import decode_manifest, encode_manifest, new_manifest
from shared.models import ModelSpec, Profile, TensorSpec
from shared.names import ModelId
from shared.pt2 import check_model, choose, exported_bytes, read_package, saved_with
from shared.quarantine import Death, Quarantine
from shared.recipes import (
    Assembled,
    Cut,
    Recipe,
    _check,
    decode_recipe,
    encode_recipe,
    extents,
    write_recipe,
)
from shared.repository import Repository
from shared.storage import LocalStorage
from shared.tenants import Quota, Tenants
from shared.tombstones import Tombstones
from shared.traces import Counts, Header, TracedModel, member, read_trace
from shared.unloaded import Unloaded
from tests.archives import archive as plain_archive
from tests.fuzz.kit import chunks, sayable, target
from tests.hostile import CODE_BOMBS
from tests.pt2_archives import COMPILED, EXPORTED
from tests.torchscript_files import Tensor, Thing, archive, entries, module, pickle, weights

_SPEC = ModelSpec(
    inputs=(TensorSpec("x", "FP32", (-1, 3)),),
    outputs=(TensorSpec("y", "FP32", (2,)),),
    max_batch_size=8,
    parameters={"k": 1.5},
)
_DIGEST = "sha256:" + "0" * 64
_MANIFEST = new_manifest("m", 1, _SPEC, _DIGEST, 100)

# --- archives ---------------------------------------------------------------------------------

_STORAGES = {"0": bytes(range(16)), "1": bytes(8)}
_MODULE = Thing(
    "__torch__.M", training=False, w=Tensor("0", 4), b=Tensor("1", 2), n=3, s="t", f=1.5,
    inner=Thing("__torch__.N", w=Tensor("0", 2, start=1)),
)  # fmt: skip
_CODE = {
    "__torch__": module(attributes=["w : Tensor", "b : Tensor", "inner : __torch__.N"])
    + module("N", ["w : Tensor"], '    y = torch.add(x, self.w)\n    return torch.gelu(y, "a")\n')
}
_WHOLE = archive(entries(_MODULE, _STORAGES, _CODE, constants=(Tensor("0", 4), 1, "c")))
_ZIP = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\1\0", b"\0\0\1\0", b"../", b"/")


@target(
    _WHOLE,
    weights(a=bytes(64)),
    plain_archive(EXPORTED),
    plain_archive(COMPILED),
    plain_archive({"a": b"x"}, root=""),
    words=(*_ZIP, b"code/", b"data/", b"data.pkl", b"constants/", b".py", b"byteorder"),
)
def archives(data: bytes) -> None:
    """An uploaded file: what it is, and what is inside."""
    file = io.BytesIO(data)
    with contextlib.suppress(InvalidRequest):
        formats = check_model(file)
        for said in (None, *formats):
            with contextlib.suppress(InvalidRequest):
                choose(formats, said)
    with contextlib.suppress(InvalidRequest):
        layout = read_layout(file)
        for block in layout.blocks:
            content = data[block.offset : block.offset + block.nbytes]
            assert hashlib.sha256(content).digest() == block.digest
    for read in (exported_bytes, read_package):
        with contextlib.suppress(InvalidRequest):
            read(file)
    saved_with(file)


@target(
    b"a" + (COMPILED["data/aotinductor/model/abc.wrapper_metadata.json"]),
    b"b" + b'{"w": ["weight_0", [2, 3], [3, 1], 0]}',
    b"c" + b'{"torch_version": "2.13.0"}',
    words=(b"[", b"{", b'"AOTI_DEVICE_KEY"', b"null"),
)
def pt2_notes(data: bytes) -> None:
    """The small entries of a .pt2 archive that are read."""
    folder = "data/aotinductor/model/"
    name = {
        ord("a"): f"{folder}abc.wrapper_metadata.json",
        ord("b"): f"{folder}weights_config.json",
    }.get(data[0] if data else 0, "models/model.json")
    file = io.BytesIO(plain_archive({**COMPILED, **EXPORTED, name: data[1:]}))
    saved_with(file)
    for read in (check_model, read_package):
        with contextlib.suppress(InvalidRequest):
            read(file)


@target(
    pickle(_MODULE), pickle((Tensor("0", 4), 1, "c")), pickle([{"a": (1, None, True, 2.5)}]),
    words=(
        *(bytes([code]) for code in b"hqrj(tKMJRX)Q\x89\x88Nc\x81}ube]a\x85\x86\x87G\x8a.oiISVpg"),
        b"cos\nsystem\n", b"c__torch__\nM\n", b"\x95" + bytes(8), b"\x93", b"\x8c\x02os",
    ),
)  # fmt: skip
def pickles(data: bytes) -> None:
    """A pickle, alone and as the graph of a module: read by an interpreter of our own."""
    with contextlib.suppress(Unreadable):
        read_pickle(data)
    members = entries(_MODULE, _STORAGES, _CODE)
    layout = read_layout(io.BytesIO(archive({**members, "data.pkl": data})))
    assert layout.obstacle is None or len(layout.obstacle) < 1000


@target(
    *(text.encode() for text in _CODE.values()),
    *(bomb()[:2000] for bomb in CODE_BOMBS.values()),
    words=(b"class M(Module):\n", b"  def f(self) -> int:\n", b"    ", b'"', b"\\", b" = ", b"for ",
           b"torch.", b"ops.", b"__torch__.", b"___torch_mangle_7", b"(", b")", b"[", b"]", b"_(",
           b"Final[", b"batch_norm(", b"\n"),
)  # fmt: skip
def code(data: bytes) -> None:
    """The text of a program, which is never run here."""
    members = entries(_MODULE, _STORAGES, {})
    file = archive({**members, "code/__torch__.py": data, "code/b.py": data[::-1]})
    layout = read_layout(io.BytesIO(file))
    assert layout.obstacle is None or len(layout.obstacle) < 1000


# --- recipes and layouts ----------------------------------------------------------------------

_RECIPE = write_recipe(
    [Cut(0, 10, None), Cut(10, 20, _DIGEST), Cut(30, 5, None)], _DIGEST[:-1] + "1"
)


@target(encode_recipe(_RECIPE), words=(b'"size":', b'["sha256:', b'"pieces":[', b'"check":'))
def recipe(data: bytes) -> None:
    """How a file is put together, and reading it by that. Its check an enemy can make too."""
    tries = [data]
    with contextlib.suppress(ValueError, RecursionError):
        loose = msgspec.json.decode(data, type=Recipe)
        pieces = loose.pieces
        sound = Recipe(size=sum(p.nbytes for p in pieces), pieces=pieces, check=_check(pieces))
        tries.append(encode_recipe(sound))
    for each in tries:
        with contextlib.suppress(Internal):
            found = decode_recipe("r", each)
            extents(found, {part: part for part in found.parts})
            file = Assembled(found.pieces, lambda _: io.BytesIO(bytes(40)))
            file.read(100)


def _resealed(data: bytes) -> bytes:
    return hashlib.sha256(data).digest() + data


_LAYOUT = Layout(architecture="a" * 64, blocks=(Block(bytes(32), 64, 16),))


@target(seal(_LAYOUT)[32:], words=(b"\xa6blocks", b"\xa5slots", b"\xa7version\x02"))
def layout(data: bytes) -> None:
    """A layout as it is kept beside a file, whose checksum an enemy can make too."""
    for sealed in (data, _resealed(data)):
        open_layout(sealed)
        found = open_contents(sealed)
        if found is not None:
            _ = found.weights_bytes


# --- descriptions -----------------------------------------------------------------------------

_CONFIG = '{"max_batch_size": 4, "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["3"]}]}'


@target(
    b'{"digest": "%s", "spec": %s}' % (_DIGEST.encode(), msgspec.json.encode(_SPEC)),
    msgspec.json.encode({"parameters": {"config": _CONFIG, "file:1/model.pt": "AAAA"}}),
    b'{"parameters": {"unload_dependents": true}}',
    b'{"split": {"1": 9, "2": 1}, "now": true}',
    words=(
        b'"inputs":[',
        b'"padding":{',
        b'"sizes":[',
        b'"placement":',
        b"null",
        b"-1",
        b"\\ud800",
    ),
)
def descriptions(data: bytes) -> None:
    """Bodies of the repository's calls: a registration, a `load`, an alias."""
    for decode in (decode_registration, decode_load, check_unload):
        with contextlib.suppress(InvalidRequest):
            decode(data)
    with contextlib.suppress(InvalidRequest):
        for file in decode_load(data).files:
            for _ in file.pieces():
                pass
    with contextlib.suppress(InvalidRequest):
        decode_wish(data).weights()
    text = data.decode("latin-1")
    for parse in (parse_revision, parse_wait, check_digest):
        with contextlib.suppress(InvalidRequest):
            parse(text)


@target(encode_manifest(_MANIFEST), words=(b'"shape":[', b'"padding":{', b"1e308", b'"version":'))
def manifest(data: bytes) -> None:
    """A version's manifest in the repository."""
    with contextlib.suppress(Internal):
        encode_manifest(decode_manifest("models/m/1/manifest.json", data))


_PBTXT = b"""
name: "m"
platform: "pytorch_libtorch"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
version_policy: { specific: { versions: [1, 3] } }
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
parameters: { key: "k" value: { string_value: "v" } }
instance_group [ { kind: KIND_CPU count: 2 } ]
"""


@target(
    _PBTXT, b"name: 'm' # c\n" + b"a { " * 40,
    words=(b"{", b"}", b"[", b"]", b"<", b">", b"a{", b"\\x", b'"', b"'", b"#", b"dims: -1",
           b"versions: 1", b"[a.b/c.d]", b"name:", b"data_type: 99"),
)  # fmt: skip
def pbtxt(data: bytes) -> None:
    """A Triton repository's config.pbtxt."""
    with contextlib.suppress(RoostError):
        config = triton.config_of(data)
        triton.spec_from_config(config, "m")
        triton.chosen_versions(config, [1, 2, 3])


# --- what the repository keeps ----------------------------------------------------------------

_ALIASES = Aliases(2, {"stable": Alias({1: 9, 2: 1})}, ("old",))
_KEY, _PRESENTED = new_key("t", ("infer", "push"), note="n")
_DEATH = Death(kind="load", worker="w", at=5.0, reason="r")


@target(
    msgspec.json.encode(_ALIASES),
    msgspec.json.encode(_DEATH),
    msgspec.json.encode({"removed_at": 1.0, "manifest": _MANIFEST}),
    msgspec.json.encode(Profile(device_kind="cpu", weights_bytes=5)),
    msgspec.json.encode(Quota()),
    msgspec.json.encode(_KEY),
    b'{"loading":[{"model":"m/1","digest":"d","deaths":1}],"suspects":[]}',
    words=(b'"split":{', b'"pending":{', b'"at":', b"1e308", b'"cases":[', b'"kind":"request"'),
)
def documents(data: bytes) -> None:
    """The small documents beside the models: aliases, deaths, tombstones, measurements, quotas."""
    with tempfile.TemporaryDirectory(prefix="roost-fuzz-", dir=_memory()) as folder:
        root = Path(folder)
        for path in (
            "aliases/m@3.json", "aliases/m@2.json", "quarantine/m@1@5-00000000.json",
            "quarantine/m@1@9-00000001.json", "models/m/1/removed.json", "unloaded/m.json",
            "tenants/t.json", "models/m/1/profiles/cpu-6d0fd2ff.json",
            f"keys/{_KEY.id}.json", "loading/1-00000000.json",
        ):  # fmt: skip
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        storage = LocalStorage(folder, durable=False)
        aliases = AliasFolder(storage)
        assert aliases.read("m").revision == 3
        aliases.read_all()
        Quarantine(storage).held()
        Tombstones(storage).forbid(_MANIFEST)
        Unloaded(storage).names()
        Tenants(storage).quotas()
        assert Keys(storage).look().some
        journal = Journal(folder)
        journal.open()
        journal.close()
        for path in (root / "models/m/1/profiles").iterdir():
            path.rename(root / _profile_path())
        Repository(folder).profiles.get(ModelId("m/1"), "cpu")


class _OneKey:
    def look(self) -> Table:
        return Table({_KEY.id: _KEY}, some=True)


_GATE = Gate(cast("Any", _OneKey()), "required", "0.0.0.0", setting="AUTH", clock=lambda: 0.0)
_GATE.look()


@target(
    f"Bearer {_PRESENTED}".encode(), f"bearer  {_PRESENTED} ".encode(), b"Basic dXNlcjpwYXNz",
    words=(b"_", b" ", b"Bearer ", _KEY.id.encode(), _KEY.sha256.encode()),
)  # fmt: skip
def authorization(data: bytes) -> None:
    """What is shown as an API key: nothing but the key opens."""
    try:
        caller = _GATE.check(data, "infer")
    except RoostError as error:
        sayable(error)
        return
    assert caller.tenant == "t"
    assert data.lower().split() == [b"bearer", _PRESENTED.encode()], data


def _profile_path() -> str:
    from shared.profiles import profile_path

    return profile_path(ModelId("m/1"), "cpu")


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


_HEAD = msgspec.json.encode({"id": "a" * 32, "model": "m/1"})


@target(
    len(_HEAD).to_bytes(4, "big") + _HEAD + b"body",
    b'{"id":"' + b"a" * 32 + b'"}',
    b'{"id":"' + b"1" * 32 + b'","fingerprint":"f"}',
)
def jobs(data: bytes) -> None:
    """A job's files, its key's, and the notes in its queue."""
    for decode in (decode_job, decode_ended, decode_claim):
        with contextlib.suppress(ValueError, JobNotFound):
            decode(data)
    with contextlib.suppress(RoostError, Broken):
        decode_note(data)


_TRACE = member(
    [
        Header(began_at=5.0),
        TracedModel(manifest=_MANIFEST),
        Counts(at=1.0, requests={ModelId("m/1"): 3}),
    ]
)


@target(
    zlib.decompress(_TRACE, 31), b"\x1f\x8b" + _TRACE[2:],
    words=(b'{"kind":"counts","at":', b'"requests":{', b"\n", b'{"kind":"worker"', b"1e308"),
)  # fmt: skip
def trace(data: bytes) -> None:
    """A recorded trace: its lines, or the file as it is."""
    packed = data if data[:2] == b"\x1f\x8b" else zlib.compress(data, 1, 31)
    path = Path(_memory() or tempfile.gettempdir()) / f"roost-fuzz-{os.getpid()}.trace"
    path.write_bytes(packed)
    try:
        read_trace(path)
    except InvalidRequest as error:
        sayable(error)
    finally:
        path.unlink()


def _reasonable(pieces: list[bytes]) -> dict[str, bytes]:
    names = ("data.pkl", "constants.pkl", "code/__torch__.py", "version", "data/0", "byteorder")
    return dict(zip(names, pieces, strict=False))


@target(b"".join(bytes([len(p) // 4]) + p for p in (pickle(_MODULE)[:400], b"\x80\2)." + b"    ")))
def members(data: bytes) -> None:
    """A sound archive of unsound members."""
    file = {**entries(_MODULE, _STORAGES, _CODE), **_reasonable(list(chunks(data)))}
    read_layout(io.BytesIO(archive(file)))
