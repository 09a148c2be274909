"""Files as recipes over parts, through the repository that has them."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from shared import files as module
from shared.blobs import blob_path
from shared.errors import Internal, InvalidRequest, ModelNotFound
from shared.files import ModelFiles
from shared.layout import Extent
from shared.layout.torchscript import read_layout
from shared.models import ModelSpec
from shared.repository import Repository
from shared.storage import open_storage
from tests.archives import torchscript as fake
from tests.torchscript_files import weights

SPEC = ModelSpec()
BIG = 70_000


def tensor(seed: int, nbytes: int = BIG) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(nbytes)


def tuned(head: int, backbone: int = 0) -> bytes:
    """A fine-tune: two large tensors that others have too, a large and a small one of its own."""
    return weights(
        a=tensor(backbone), b=tensor(backbone + 100), head=tensor(head + 1), bias=tensor(head, 400)
    )


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def put(repository: Repository, data: bytes, name: str | None = None) -> str:
    digest, size = repository.files.put([data])
    assert (digest, size) == (sha(data), len(data))
    if name is not None:
        repository.register(name, 1, SPEC, digest)
    return digest


def content(extents: tuple[Extent, ...]) -> bytes:
    return b"".join(Path(e.path).read_bytes()[e.offset : e.offset + e.nbytes] for e in extents)


def kept(root: Path, folder: str = "blobs") -> int:
    return sum(path.stat().st_size for path in (root / folder).rglob("*") if path.is_file())


def names(root: Path, folder: str = "blobs") -> set[str]:
    return {f"sha256:{path.name}" for path in (root / folder).rglob("*") if path.is_file()}


def test_a_file_comes_back_as_it_was(repository, url, cache):
    """Cut up or not, a file has its own digest and size, and its bytes in one piece or in many."""
    for data in (tuned(1), weights(a=b"1234"), fake(), b"anything"):
        digest = put(repository, data)
        other = Repository(url)
        assert other.files.has(digest)
        assert other.files.size(digest) == len(data)
        assert content(other.files.extents(digest, cache)) == data
        assert Path(other.files.path(digest, cache)).read_bytes() == data
        assert other.files.put([data]) == (digest, len(data))


def test_tensors_are_kept_once(local, root):
    """A second fine-tune takes only what is its own."""
    put(local, tuned(1))
    before = kept(root)
    put(local, tuned(3))
    assert kept(root) - before < BIG + 4000
    assert len(names(root, "recipes")) == 2
    assert put(local, tuned(1)) in names(root, "recipes")


def test_parts_are_the_tensors(local, root):
    """Large tensors bear the names of their contents, all else is one more part."""
    put(local, tuned(1))
    tensors = {sha(tensor(0)), sha(tensor(100)), sha(tensor(2))}
    assert tensors < names(root)
    assert len(names(root)) == 4


def test_a_directory_is_read_where_it_is(local, root, cache):
    """Nothing is copied: the stretches lie in the repository itself."""
    extents = local.files.extents(put(local, tuned(1)), cache)
    assert {Path(extent.path).is_relative_to(root) for extent in extents} == {True}
    assert not Path(cache).exists()


def test_only_what_is_missing_travels(cache, monkeypatch):
    """From a bucket, a second fine-tune brings its own parts to the cache and no other."""
    url = f"memory://{uuid.uuid4().hex}"
    repository = Repository(url)
    first, second = put(repository, tuned(1)), put(repository, tuned(3))
    repository.files.extents(first, cache)
    before = names(Path(cache))
    assert content(Repository(url).files.extents(second, cache)) == tuned(3)
    assert len(names(Path(cache)) - before) == 2


@pytest.mark.parametrize("how", ["changed", "short", "missing"])
def test_a_damaged_part_is_found(root, cache, how):
    """Whoever reads a file whose part is damaged is told; storing the file again heals it."""
    digest = put(Repository(str(root)), tuned(1), "m")
    part = root / blob_path(sha(tensor(0)))
    if how == "missing":
        part.unlink()
    else:
        part.write_bytes(bytes(BIG if how == "changed" else 10))
    with pytest.raises(Internal, match="damaged"):
        Repository(str(root)).files.extents(digest, cache)
    with pytest.raises((Internal, ModelNotFound)):
        Repository(str(root)).files.path(digest, cache)
    if how != "changed":
        put(Repository(str(root)), tuned(1))
        assert content(Repository(str(root)).files.extents(digest, cache)) == tuned(1)


def test_a_damaged_part_is_not_built_upon(root, cache):
    """A new file that needs a damaged part brings a sound one."""
    put(Repository(str(root)), tuned(1))
    (root / blob_path(sha(tensor(0)))).write_bytes(bytes(BIG))
    second = put(Repository(str(root)), tuned(3))
    assert content(Repository(str(root)).files.extents(second, cache)) == tuned(3)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"1"])
def test_a_damaged_recipe_is_found(local, root, cache, damage):
    """It is named; its parts stay; storing the file again heals it."""
    digest = put(local, tuned(1), "m")
    path = root / "recipes/sha256" / digest[7:9] / digest[7:]
    text = path.read_bytes()
    path.write_bytes(damage if damage != b"1" else text.replace(b'"size":2', b'"size":3'))
    with pytest.raises(Internal, match="recipes/sha256"):
        local.files.extents(digest, cache)
    put(local, tuned(1))
    assert content(local.files.extents(digest, cache)) == tuned(1)
    swapped = msgspec.json.decode(text)
    swapped["pieces"][1], swapped["pieces"][3] = swapped["pieces"][3], swapped["pieces"][1]
    path.write_bytes(msgspec.json.encode(swapped))
    with pytest.raises(Internal, match="damaged"):
        local.files.extents(digest, cache)


def test_files_from_before_are_read(local, root, cache):
    """A repository of an older Roost has whole files and no layouts; they serve as they are, and
    the layout is made when somebody asks."""
    data = tuned(1)
    path = root / blob_path(sha(data))
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    local.register("m", 1, SPEC, sha(data))
    assert local.files.extents(sha(data), cache) == (Extent(str(path), 0, len(data)),)
    assert local.files.path(sha(data), cache) == str(path)
    layout = local.files.layout(sha(data), cache)
    assert layout is not None
    assert layout.architecture
    assert names(root, "layouts") == {sha(data)}
    assert put(local, data) == sha(data)
    assert not (root / "recipes").exists()


def test_layouts_are_kept_beside_their_files(repository, url, cache, tmp_path):
    """A layout is there as soon as the file is, and is that of the file."""
    digest = put(repository, tuned(1))
    path = tmp_path / "model.pt"
    path.write_bytes(tuned(1))
    other = Repository(url)
    assert other.files.layout(digest, cache) == read_layout(path)
    assert not Path(cache).exists()
    assert other.files.layout(put(repository, b"no model"), cache) is None
    obstacle = other.files.layout(put(repository, fake()), cache)
    assert obstacle is not None
    assert obstacle.obstacle


@pytest.mark.parametrize(
    "text", [b"", b"\xc1", bytes(32) + b"\x80", bytes(32) + b"\x81\xa7version\x63"]
)
def test_a_layout_of_another_version_is_made_anew(local, root, cache, text):
    """What cannot be read or is of another program's version is replaced."""
    digest = put(local, tuned(1))
    layout = local.files.layout(digest, cache)
    path = root / "layouts/sha256" / digest[7:9] / digest[7:]
    good = path.read_bytes()
    path.write_bytes(text)
    assert local.files.layout(digest, cache) == layout
    assert path.read_bytes() == good


def test_a_damaged_layout_is_not_counted_by(local, root):
    """A bit that flipped is found out by whoever reads a part of it only, too."""
    digest = put(local, tuned(1))
    manifest = local.register("m", 1, SPEC, digest)
    assert local.sharing()[manifest.id].own_bytes == manifest.size_bytes
    estimate = local.estimate(manifest)
    assert estimate.weights_bytes == local.files.layout(digest, "").weights_bytes
    assert estimate.shares
    assert not estimate.measured
    path = root / "layouts/sha256" / digest[7:9] / digest[7:]
    data = bytearray(path.read_bytes())
    at = data.index(hashlib.sha256(tensor(0)).digest())
    data[at] ^= 1
    path.write_bytes(data)
    assert local.estimate(manifest) is None
    assert ModelFiles(open_storage(str(root))).blocks([digest]) == {}


def test_what_cannot_be_told_apart_is_not_estimated(local):
    """A model with a state, and a file that is not understood."""
    digest = put(local, tuned(1))
    stateful = local.register("m", 1, ModelSpec(stateful=True), digest)
    assert local.estimate(stateful) is None
    odd = local.register("odd", 1, SPEC, put(local, fake()))
    assert local.estimate(odd) is None


def test_absence(repository, cache):
    """What is not there is said to be not there, whatever is asked."""
    for call in (
        repository.files.extents, repository.files.path, repository.files.layout,
        lambda digest, _: repository.files.size(digest),
    ):  # fmt: skip
        with pytest.raises(ModelNotFound):
            call(sha(b"absent"), cache)
        with pytest.raises(InvalidRequest, match="not a digest"):
            call("sha256:../x", cache)
    with pytest.raises(InvalidRequest, match="upload it first"):
        repository.register("m", 1, SPEC, sha(b"absent"))


# --- garbage ----------------------------------------------------------------------------


def test_parts_go_with_the_last_file_that_needs_them(repository, url):
    """Removing one fine-tune frees what is its own; removing the last frees all."""
    first, second = put(repository, tuned(1), "one"), put(repository, tuned(3), "two")
    repository.remove("one")
    collected = repository.collect_garbage(0.0)
    assert (collected.blobs, collected.parts) == (1, 2)
    assert BIG < collected.blob_bytes < BIG + 4000
    assert not repository.files.has(first)
    assert repository.files.has(second)
    assert Repository(url).files.has(sha(tensor(0)))
    repository.remove("two")
    collected = repository.collect_garbage(0.0)
    assert (collected.blobs, collected.parts) == (1, 4)
    assert not Repository(url).files.has(sha(tensor(0)))
    assert repository.collect_garbage(0.0).blob_bytes == 0


def test_nothing_is_left_of_a_collected_file(local, root):
    """No recipe, part or layout."""
    put(local, tuned(1), "m")
    local.remove("m")
    local.collect_garbage(0.0)
    assert not names(root) | names(root, "recipes") | names(root, "layouts")


def test_young_files_keep_their_parts(local, root, cache):
    """A file that waits for its registration keeps even parts that are old themselves."""
    digest = put(local, tuned(1))
    for path in (root / "blobs").rglob("*"):
        os.utime(path, (1, 1))
    assert local.collect_garbage(60.0).blob_bytes == 0
    assert content(local.files.extents(digest, cache)) == tuned(1)


def test_storing_again_makes_a_file_young(local, root):
    """A file that was about to be collected stays when somebody brings it once more."""
    digest = put(local, tuned(1))
    for path in root.rglob("*"):
        os.utime(path, (1, 1))
    put(local, tuned(1))
    assert local.collect_garbage(60.0).blob_bytes == 0
    assert local.files.has(digest)


def test_a_recipe_that_cannot_be_read_keeps_its_parts(local, root):
    """A newer Roost may write what this one cannot read; its parts are not garbage."""
    digest = put(local, tuned(1), "m")
    path = root / "recipes/sha256" / digest[7:9] / digest[7:]
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    assert local.collect_garbage(0.0).blob_bytes == 0


def test_parts_that_nobody_finished_are_collected(local, root, monkeypatch):
    """An upload that dies between its parts and its recipe leaves garbage, not a file."""

    def die(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode_recipe", die)
    with pytest.raises(KeyboardInterrupt):
        put(local, tuned(1))
    monkeypatch.undo()
    assert not local.files.has(sha(tuned(1)))
    assert names(root)
    local.collect_garbage(0.0)
    assert not names(root) | names(root, "layouts")
    assert not list((root / "tmp").iterdir())


def test_registrations_and_collections_lose_no_part(root, cache):
    """Fine-tunes come and go while garbage is collected all the time; what is registered is
    always whole."""
    done = threading.Event()

    def collect():
        repository = Repository(str(root))
        while not done.is_set():
            repository.collect_garbage(0.0)

    def register(number: int):
        repository = Repository(str(root))
        for turn in range(6):
            data = tuned(number * 10 + turn * 2)
            while True:
                try:
                    manifest = repository.register("m", None, SPEC, put(repository, data))
                    break
                except InvalidRequest:  # collected before it was registered: bring it again
                    continue
            assert content(Repository(str(root)).files.extents(manifest.digest, cache)) == data
            repository.remove("m", manifest.version)

    with ThreadPoolExecutor(4) as pool:
        collector = pool.submit(collect)
        workers = [pool.submit(register, number) for number in range(3)]
        try:
            for worker in workers:
                worker.result(100)
        finally:
            done.set()
        collector.result(30)
    Repository(str(root)).collect_garbage(0.0)
    assert not names(root)
