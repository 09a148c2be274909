from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import structlog.testing

from shared.blobs import blob_path
from shared.errors import (
    AlreadyExists,
    Internal,
    InvalidRequest,
    ModelNotFound,
    TooLarge,
    Unavailable,
)
from shared.imports import import_triton
from shared.models import Case, ModelSpec, Profile, TensorSpec
from shared.names import ModelId
from shared.repository import Repository
from tests.archives import torchscript

SPEC = ModelSpec(inputs=(TensorSpec("x", "FP32", (-1, 4)),), max_batch_size=8)
OTHER = ModelSpec(target_ms=5.0)


def put(repository: Repository, weights: bytes = bytes(64)) -> str:
    return repository.files.put([torchscript(weights)])[0]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def files(root: Path) -> set[str]:
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return found - {"lock"}


# --- files ------------------------------------------------------------------------------


def test_blobs_are_named_by_content(repository):
    """A file is stored under its checksum; the same content again is the same file."""
    data = os.urandom(3_000_000)
    chunks = [data[:1_000_000], memoryview(data)[1_000_000:]]
    assert repository.files.put(chunks) == (digest_of(data), len(data))
    assert repository.files.put([data], expect=digest_of(data))[0] == digest_of(data)
    assert repository.files.has(digest_of(data))
    assert repository.files.size(digest_of(data)) == len(data)
    with pytest.raises(ModelNotFound):
        repository.files.size(digest_of(b"other"))


def test_layout_of_a_directory(local, root):
    """The folders are those that the documentation names, and nothing is left over."""
    digest = put(local)
    local.register("m", 3, SPEC, digest)
    hexadecimal = digest.removeprefix("sha256:")
    assert files(root) == {
        f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}",
        f"layouts/sha256/{hexadecimal[:2]}/{hexadecimal}",
        "models/m/3/manifest.json",
    }


def test_a_wrong_checksum_is_refused(repository):
    """Content that is not what was announced is not kept."""
    with pytest.raises(InvalidRequest, match="checksum does not match"):
        repository.files.put([b"data"], expect=digest_of(b"other"))
    with pytest.raises(InvalidRequest, match="not a digest"):
        repository.files.put([b"data"], expect="md5:123")
    assert not repository.files.has(digest_of(b"data"))


def test_too_large_uploads_stop(local, root):
    """An upload beyond its limit ends at once and leaves nothing."""
    with pytest.raises(TooLarge, match="limit of 10 bytes"):
        local.files.put([b"12345", b"678901"], max_bytes=10)
    assert files(root) == set()
    assert local.files.put([b"1234567890"], max_bytes=10)[1] == 10


def test_an_upload_without_commit_is_forgotten(local, root):
    """Leaving the block, or losing the writer, removes its temporary file."""
    with local.files.writer() as writer:
        writer.write(b"half")
        assert len(files(root)) == 1
    assert files(root) == set()
    with pytest.raises(ValueError, match="over"):
        writer.write(b"more")
    lost = local.files.writer()
    lost.write(b"half")
    del lost
    gc.collect()
    assert files(root) == set()


def test_a_blob_is_invisible_until_it_is_whole(repository):
    """While it is written, nobody sees it."""
    with repository.files.writer() as writer:
        writer.write(b"all of it")
        assert not repository.files.has(digest_of(b"all of it"))
        assert writer.commit(digest_of(b"all of it")) == (digest_of(b"all of it"), 9)
    assert repository.files.has(digest_of(b"all of it"))


@pytest.mark.parametrize("digest", ["", "sha256:../../etc/passwd", "sha256:" + "A" * 64])
def test_digests_are_checked_before_they_are_paths(repository, digest, tmp_path):
    """What is not a digest never becomes a path."""
    for call in (
        repository.files.has,
        repository.files.size,
        lambda digest: repository.files.path(digest, str(tmp_path)),
        lambda digest: repository.register("m", 1, SPEC, digest),
    ):
        with pytest.raises(InvalidRequest, match="not a digest"):
            call(digest)


# --- versions ---------------------------------------------------------------------------


def test_register_and_look_up(repository, url):
    """What was registered is found again, by another process too."""
    digest = put(repository)
    manifest = repository.register("m", 2, SPEC, digest)
    assert (manifest.id, manifest.digest) == ("m/2", digest)
    assert manifest.size_bytes == len(torchscript())
    assert manifest.inputs == SPEC.inputs
    again = Repository(url)
    assert again.versions.manifest("m", 2) == manifest
    assert again.versions.manifest("m") == manifest
    assert list(again.versions.names()) == ["m"]
    assert again.versions.numbers("m") == [2]
    assert again.versions.manifests() == [manifest]


def test_an_empty_repository(repository):
    """Nothing there is nothing found, not an error."""
    assert list(repository.versions.names()) == []
    assert repository.versions.manifests() == []
    assert repository.versions.numbers("m") == []
    with pytest.raises(ModelNotFound, match="'m' is not registered"):
        repository.versions.manifest("m")
    with pytest.raises(ModelNotFound, match="'m' is not registered"):
        repository.versions.manifest("m", 1)


def test_the_highest_version_is_the_default(repository):
    """Versions are numbers: ten comes after nine."""
    digest = put(repository)
    for version in (9, 10, 2):
        repository.register("m", version, SPEC, digest)
    assert repository.versions.manifest("m").version == 10
    assert repository.versions.numbers("m") == [2, 9, 10]
    with pytest.raises(ModelNotFound, match="no version 3"):
        repository.versions.manifest("m", 3)


def test_registering_the_same_again_changes_nothing(repository):
    """The first manifest is returned, with its time of registration."""
    digest = put(repository)
    first = repository.register("m", 1, SPEC, digest)
    assert repository.register("m", 1, SPEC, digest) == first
    assert repository.register("m", None, SPEC, digest) == first


def test_versions_are_immutable(repository):
    """Another file or another specification under an existing version is refused."""
    digest, other = put(repository), put(repository, b"other weights")
    first = repository.register("m", 1, SPEC, digest)
    for spec, file in ((SPEC, other), (OTHER, digest)):
        with pytest.raises(AlreadyExists, match="has a version 1 already"):
            repository.register("m", 1, spec, file)
    assert repository.versions.manifest("m", 1) == first


def test_the_next_version(repository):
    """Without a version the next number is taken; an older content is a new version again."""
    digest, other = put(repository), put(repository, b"other weights")
    numbers = [repository.register("m", None, SPEC, d).version for d in (digest, other, digest)]
    assert numbers == [1, 2, 3]


@pytest.mark.parametrize("name", ["", "../m", "a/b", ".m", "m" * 129, "m\n", "ä"])
def test_names_are_checked_before_they_are_paths(repository, name):
    """What is not a model name never becomes a path."""
    digest = put(repository)
    for call in (
        lambda: repository.register(name, 1, SPEC, digest),
        lambda: repository.versions.manifest(name),
        lambda: repository.versions.numbers(name),
        lambda: repository.remove(name),
        lambda: repository.profiles.get(ModelId(f"{name}/1"), "cpu"),
    ):
        with pytest.raises(InvalidRequest):
            call()
    with pytest.raises(InvalidRequest, match="not a model version"):
        repository.register("m", 0, SPEC, digest)


def test_only_torchscript_is_registered(repository):
    """A file that is none, or is not there, is refused before anything is written."""
    digest, _ = repository.files.put([b"not a model"])
    with pytest.raises(InvalidRequest, match="not a zip"):
        repository.register("m", 1, SPEC, digest)
    with pytest.raises(InvalidRequest, match="upload it first"):
        repository.register("m", 1, SPEC, digest_of(b"never uploaded"))
    assert list(repository.versions.names()) == []


def race(count, act):
    """Runs `act(number)` in `count` threads that start together; results or exceptions."""
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait(10)
        try:
            return act(number)
        except Exception as error:  # noqa: BLE001 — returned to the test
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_one_of_several_registrations_wins(url):
    """Of several different contents for one new version one wins, the others are told."""
    repositories = [Repository(url) for _ in range(6)]
    digests = [put(repositories[0], bytes([number])) for number in range(6)]
    results = race(6, lambda n: repositories[n].register("m", 1, SPEC, digests[n]))
    winners = [result for result in results if not isinstance(result, Exception)]
    assert len(winners) == 1
    assert sum(isinstance(result, AlreadyExists) for result in results) == 5
    assert repositories[0].versions.manifest("m", 1) == winners[0]


def test_equal_registrations_agree(url):
    """Of several equal ones each gets the same manifest, time of registration included."""
    repositories = [Repository(url) for _ in range(6)]
    results = race(6, lambda n: repositories[n].register("m", None, SPEC, put(repositories[n])))
    assert results == [repositories[0].versions.manifest("m", 1)] * 6


def test_next_versions_do_not_collide(url):
    """Registrations without a version at the same time get one number each."""
    repository = Repository(url)
    digests = [put(repository, bytes([number])) for number in range(8)]
    results = race(8, lambda n: repository.register("m", None, SPEC, digests[n]).version)
    assert sorted(results) == list(range(1, 9))


def test_remove(repository):
    """One version goes, or all of them, with their measurements; the files stay."""
    digest = put(repository)
    for version in (1, 2, 3):
        repository.register("m", version, SPEC, digest)
    repository.profiles.put(ModelId("m/2"), Profile(device_kind="cpu", weights_bytes=1))
    repository.remove("m", 2)
    assert repository.versions.numbers("m") == [1, 3]
    assert repository.profiles.get(ModelId("m/2"), "cpu") is None
    with pytest.raises(ModelNotFound, match="no version 2"):
        repository.remove("m", 2)
    repository.remove("m")
    assert list(repository.versions.names()) == []
    with pytest.raises(ModelNotFound, match="is not registered"):
        repository.remove("m")
    assert repository.files.has(digest)
    assert repository.register("m", None, OTHER, digest).version == 4
    assert repository.versions.manifests() == [repository.versions.manifest("m", 4)]


def test_unload_and_load(repository, url):
    """Every process sees it; it goes with the model, and versions come and go meanwhile."""
    digest = put(repository)
    repository.register("m", 1, SPEC, digest)
    repository.register("n", 1, SPEC, digest)
    for _ in range(2):
        repository.unload("m")
    assert Repository(url).unloaded() == repository.unloaded() == {"m"}
    repository.register("m", 2, OTHER, digest)
    repository.remove("m", 1)
    assert repository.unloaded() == {"m"}
    assert repository.load("m")
    assert not repository.load("m")
    assert repository.unloaded() == frozenset()
    repository.unload("m")
    repository.remove("m")
    assert repository.unloaded() == frozenset()
    for call in (repository.load, repository.unload):
        with pytest.raises(ModelNotFound):
            call("m")


def test_removing_leaves_a_tombstone_only(local, root):
    """Of a removed version stays what it was and when it went; not its measurements."""
    digest = put(local)
    local.register("m", 1, SPEC, digest)
    local.profiles.put(ModelId("m/1"), Profile(device_kind="cpu", weights_bytes=1))
    local.remove("m")
    kept = {blob_path(digest), blob_path(digest).replace("blobs", "layouts")}
    assert files(root) - kept == {"models/m/1/removed.json"}
    tombstone = msgspec.json.decode((root / "models/m/1/removed.json").read_bytes())
    assert tombstone["manifest"]["digest"] == digest
    assert tombstone["removed_at"] >= tombstone["manifest"]["created_at"]


def test_the_next_version_is_above_removed_ones(repository):
    """A number that was given stays given, also when no version is left."""
    digest, other = put(repository), put(repository, b"other weights")
    for version in (1, 2, 7):
        repository.register("m", version, SPEC, digest)
    repository.remove("m", 7)
    assert repository.register("m", None, SPEC, digest).version == 2, "the newest is this already"
    assert repository.register("m", None, SPEC, other).version == 8
    repository.remove("m")
    assert repository.register("m", None, SPEC, other).version == 9


def test_a_removed_version_is_not_registered_as_another(repository, url):
    """Another file or specification under a number that was used is refused; the message says
    what to do."""
    digest, other = put(repository), put(repository, b"other weights")
    for version in (1, 2):
        repository.register("m", version, SPEC, digest)
    repository.remove("m", 1)
    for spec, file in ((SPEC, other), (OTHER, digest)):
        with pytest.raises(AlreadyExists, match="version 1 of model 'm' was removed") as caught:
            Repository(url).register("m", 1, spec, file)
        assert str(caught.value).endswith(
            "version numbers are not used again, push without a version or as 3"
        )
    assert repository.versions.numbers("m") == [2]
    assert repository.register("m", 3, OTHER, other).version == 3


def test_a_removed_version_comes_back_as_it_was(repository):
    """The same file and specification revive it, without its measurements, as often as one
    likes, and never as anything else."""
    digest = put(repository)
    repository.register("m", 1, SPEC, digest)
    repository.profiles.put(ModelId("m/1"), Profile(device_kind="cpu", weights_bytes=1))
    for _ in range(2):
        repository.remove("m")
        with pytest.raises(AlreadyExists, match="was removed"):
            repository.register("m", 1, OTHER, digest)
        revived = repository.register("m", 1, SPEC, digest)
        assert repository.versions.manifests() == [revived] == [repository.versions.manifest("m")]
        assert repository.profiles.get(revived.id, "cpu") is None
        with pytest.raises(AlreadyExists, match="has a version 1 already"):
            repository.register("m", 1, OTHER, digest)
    assert repository.register("m", None, OTHER, digest).version == 2


def test_a_removed_model_is_not_there(repository, url):
    """Tombstones alone are no model, and keep no file."""
    digest = put(repository)
    repository.register("m", 1, SPEC, digest)
    repository.remove("m")
    for each in (repository, Repository(url)):
        assert list(each.versions.names()) == []
        assert each.versions.numbers("m") == []
        assert each.versions.manifests() == []
        for version in (None, 1):
            with pytest.raises(ModelNotFound, match="'m' is not registered"):
                each.versions.manifest("m", version)
        with pytest.raises(ModelNotFound):
            each.profiles.put(ModelId("m/1"), Profile(device_kind="cpu", weights_bytes=1))
    assert repository.collect_garbage(0.0).blobs == 1
    with pytest.raises(InvalidRequest, match="upload it first"):
        repository.register("m", 1, SPEC, digest)
    put(repository)
    assert repository.register("m", 1, SPEC, digest).version == 1


@pytest.mark.parametrize("text", ["", "{", '{"removed_at": 1.0, "manifest": {"name": "m"}}'])
def test_a_broken_tombstone_keeps_the_number(local, root, text):
    """When nobody can tell what a version was, nothing comes back under its number."""
    digest = put(local)
    local.register("m", 1, SPEC, digest)
    local.remove("m")
    (root / "models" / "m" / "1" / "removed.json").write_text(text)
    with pytest.raises(AlreadyExists, match="was removed"):
        local.register("m", 1, SPEC, digest)
    assert local.register("m", None, SPEC, digest).version == 2


def test_a_removal_that_was_cut_short_is_none(local, root):
    """A manifest beside a tombstone is a version, and can be removed again."""
    digest = put(local)
    first = local.register("m", 1, SPEC, digest)
    path = root / "models" / "m" / "1" / "manifest.json"
    text = path.read_bytes()
    local.remove("m")
    path.write_bytes(text)
    assert local.register("m", 1, SPEC, digest) == local.versions.manifest("m") == first
    local.remove("m", 1)
    assert local.versions.numbers("m") == []


def test_a_number_never_means_two_files(url):
    """However registrations and removals of one number meet, only one content is ever seen."""
    repositories = [Repository(url) for _ in range(6)]
    digests = [put(repositories[0], bytes([number])) for number in range(6)]

    def act(number):
        seen = set()
        for _ in range(10):
            with contextlib.suppress(AlreadyExists):
                registered = repositories[number].register("m", 1, SPEC, digests[number])
                seen.add(registered.digest)
            with contextlib.suppress(ModelNotFound):
                repositories[number].remove("m", 1)
        return seen

    results = race(6, act)
    assert not [result for result in results if isinstance(result, Exception)]
    assert len(set().union(*results)) == 1


@pytest.mark.parametrize(
    "text", ["", "{", '{"name": "bad"}', "[1]", '{"name": "\xff"}', "[" * 5000]
)
def test_a_broken_manifest_is_named(local, root, text):
    """Asking for it names the file; listings go on without it and log it once."""
    manifest = local.register("good", 1, SPEC, put(local))
    path = root / "models" / "bad" / "1" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(Internal, match=r"models/bad/1/manifest.json is not a valid manifest"):
        local.versions.manifest("bad")
    with structlog.testing.capture_logs() as logs:
        assert local.versions.manifests() == [manifest]
        assert local.versions.manifests() == [manifest]
    assert [log["path"] for log in logs] == ["models/bad/1/manifest.json"]
    assert local.register("bad", None, SPEC, manifest.digest).version == 2
    local.remove("bad", 1)
    assert local.versions.manifest("bad").version == 2
    with pytest.raises(AlreadyExists, match="was removed"):
        local.register("bad", 1, SPEC, manifest.digest)


def test_a_manifest_must_be_that_of_its_folder(local, root):
    """A manifest that was copied elsewhere is broken, not another model."""
    local.register("m", 1, SPEC, put(local))
    copy = root / "models" / "copied" / "1" / "manifest.json"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((root / "models" / "m" / "1" / "manifest.json").read_bytes())
    with pytest.raises(Internal, match="it is that of m/1"):
        local.versions.manifest("copied")


def test_strange_folders_are_passed_by(local, root):
    """Names and versions that are not ours are no models."""
    manifest = local.register("m", 1, SPEC, put(local))
    for strange in ("m/01", "m/latest", ".hidden/1", "a b/1", "m/1/2"):
        folder = root / "models" / strange
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    (root / "models" / "file").write_text("")
    (root / "models" / "empty").mkdir()
    assert list(local.versions.names()) == ["m"]
    assert local.versions.numbers("m") == [1]
    assert local.versions.manifests() == [manifest]


def test_listings_see_what_others_change(url):
    """A listing keeps nothing from before that another process has changed."""
    ours, theirs = Repository(url), Repository(url)
    digest = put(ours)
    ours.register("a", 1, SPEC, digest)
    assert len(theirs.versions.manifests()) == 1
    ours.register("b", 1, SPEC, digest)
    assert [manifest.id for manifest in theirs.versions.manifests()] == ["a/1", "b/1"]
    ours.remove("a")
    ours.register("a", 2, OTHER, digest)
    assert theirs.versions.manifests() == [ours.versions.manifest("a"), ours.versions.manifest("b")]


# --- garbage ----------------------------------------------------------------------------


def test_garbage_is_what_no_manifest_mentions(repository):
    """Files go when their last version has gone, and not before."""
    kept, dropped = put(repository), put(repository, b"other weights")
    repository.register("m", 1, SPEC, kept)
    repository.register("m", 2, SPEC, dropped)
    repository.register("n", 1, SPEC, dropped)
    repository.remove("m", 2)
    assert repository.collect_garbage(0.0).blobs == 0
    repository.remove("n")
    collected = repository.collect_garbage(0.0)
    size = len(torchscript(b"other weights"))
    assert (collected.blobs, collected.blob_bytes) == (1, size)
    assert repository.files.has(kept)
    assert not repository.files.has(dropped)
    with pytest.raises(InvalidRequest, match="upload it first"):
        repository.register("m", 2, SPEC, dropped)


def test_young_garbage_stays(local, root):
    """A file may wait for its registration; storing it again makes it young again."""
    digest = put(local)
    assert local.collect_garbage(3600.0).blobs == 0
    os.utime(root / blob_path(digest), (1, 1))
    put(local)
    assert local.collect_garbage(3600.0).blobs == 0
    os.utime(root / blob_path(digest), (1, 1))
    assert local.collect_garbage(3600.0).blobs == 1


def test_a_manifest_that_cannot_be_read_keeps_its_file(local, root):
    """A newer Roost may write what this one cannot read; its files are not garbage."""
    digest = put(local)
    local.register("m", 1, SPEC, digest)
    path = root / "models" / "m" / "1" / "manifest.json"
    path.write_text(f'{{"new_field": 1, "digest": "{digest}"}}')
    assert local.collect_garbage(0.0).blobs == 0


def test_uploads_of_dead_processes_are_collected(local, root):
    """What a killed process left goes; what a living one writes stays."""
    script = (
        "import os, signal, sys; from shared.repository import Repository\n"
        "writer = Repository(sys.argv[1]).files.writer(); writer.write(b'half')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(root)], check=False)
    with local.files.writer() as writer:
        writer.write(b"alive")
        assert len(files(root)) == 2
        assert local.collect_garbage(3600.0).unfinished_uploads == 0
        assert local.collect_garbage(0.0).unfinished_uploads == 1
        digest, _ = writer.commit()
    assert local.files.has(digest)


def test_storing_and_collecting_at_once(local):
    """A registration beside a collector succeeds, or says to upload again; never a version
    without its file."""
    stop = threading.Event()

    def collect():
        while not stop.is_set():
            local.collect_garbage(0.0)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        registered, refused = [], []
        for number in range(30):
            digest = put(local, bytes([number]))
            try:
                registered.append(local.register("m", None, SPEC, digest))
            except InvalidRequest as error:
                refused.append(str(error))
    finally:
        stop.set()
        collector.join()
    assert all("upload it first" in reason for reason in refused)
    assert all(local.files.has(manifest.digest) for manifest in registered)


# --- local files ------------------------------------------------------------------------


def test_local_path_of_a_directory(local, root, tmp_path):
    """The repository's own file, uncopied."""
    digest = put(local)
    cache = tmp_path / "cache"
    for repository in (local, Repository(str(root))):
        assert repository.files.path(digest, str(cache)) == str(root / blob_path(digest))
    assert not cache.exists()
    with pytest.raises(ModelNotFound):
        local.files.path(digest_of(b"other"), str(cache))


def test_a_damaged_file_is_not_handed_out(local, root, tmp_path):
    """A changed file is found out by the first call of a process, a cut one by every call."""
    digest = put(local)
    local.files.path(digest, str(tmp_path))
    path = root / blob_path(digest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Internal, match="is damaged"):
        local.files.path(digest, str(tmp_path))
    path.write_bytes(bytes(len(torchscript())))
    with pytest.raises(Internal, match="is damaged"):
        Repository(str(root)).files.path(digest, str(tmp_path))


def test_local_path_of_a_url(tmp_path):
    """The file is copied once, whole, and copied again when the copy was damaged."""
    url = f"memory://{uuid.uuid4().hex}"
    repository = Repository(url)
    digest = put(repository)
    cache = tmp_path / "cache"
    path = Path(repository.files.path(digest, str(cache)))
    assert path.read_bytes() == torchscript()
    assert path.is_relative_to(cache)
    inode = path.stat().st_ino
    assert repository.files.path(digest, str(cache)) == str(path)
    assert Repository(url).files.path(digest, str(cache)) == str(path)
    assert path.stat().st_ino == inode
    path.write_bytes(b"cut")
    assert Path(repository.files.path(digest, str(cache))).read_bytes() == torchscript()
    assert files(cache) == {blob_path(digest)}
    with pytest.raises(ModelNotFound):
        repository.files.path(digest_of(b"other"), str(cache))


def test_a_damaged_source_is_not_copied(tmp_path):
    """A file that was damaged in the bucket never reaches the cache."""
    import fsspec

    name = uuid.uuid4().hex
    repository = Repository(f"memory://{name}")
    digest = put(repository)
    fsspec.filesystem("memory").pipe_file(f"/{name}/{blob_path(digest)}", b"damaged")
    with pytest.raises(Internal, match="copy is damaged"):
        repository.files.path(digest, str(tmp_path))
    assert files(tmp_path) == set()


def test_many_threads_fetch_one_file(tmp_path):
    """However many ask at once, each gets the whole file and nothing is left over."""
    repository = Repository(f"memory://{uuid.uuid4().hex}")
    digest = put(repository, os.urandom(200_000))
    paths = race(8, lambda _: repository.files.path(digest, str(tmp_path)))
    assert paths == [str(tmp_path / blob_path(digest))] * 8
    assert digest_of(Path(paths[0]).read_bytes()) == digest
    assert files(tmp_path) == {blob_path(digest)}


# --- measurements and troubles ----------------------------------------------------------


def test_profiles_by_device_kind(repository):
    """The last measurement of each kind of device is kept, whatever the kind is called."""
    repository.register("m", 1, SPEC, put(repository))
    model = ModelId("m/1")
    kinds = ["cpu", "cuda:NVIDIA H100 80GB HBM3", "cuda:NVIDIA_H100_80GB_HBM3", "../x", "x" * 300]
    for size, kind in enumerate(kinds):
        assert repository.profiles.get(model, kind) is None
        cases = (Case(1, seconds=0.5), Case(8, seconds=1.0))
        profile = Profile(device_kind=kind, weights_bytes=size, cases=cases)
        repository.profiles.put(model, profile)
        assert repository.profiles.get(model, kind) == profile
    again = Profile(device_kind="cpu", weights_bytes=7)
    repository.profiles.put(model, again)
    assert repository.profiles.get(model, "cpu") == again
    assert repository.versions.numbers("m") == [1]
    with pytest.raises(ModelNotFound, match="m/2"):
        repository.profiles.put(ModelId("m/2"), again)


def test_a_broken_profile_is_measured_again(local, root):
    """What cannot be read counts as not measured."""
    local.register("m", 1, SPEC, put(local))
    local.profiles.put(ModelId("m/1"), Profile(device_kind="cpu", weights_bytes=7))
    (path,) = (root / "models" / "m" / "1" / "profiles").iterdir()
    path.write_text("{")
    with structlog.testing.capture_logs() as logs:
        assert local.profiles.get(ModelId("m/1"), "cpu") is None
    assert logs[0]["event"] == "profile_skipped"


def test_trouble_with_the_files_is_unavailable(tmp_path):
    """The system's errors do not travel: whoever asks hears that the repository is away."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="repository cannot be used"):
        Repository(str(tmp_path / "file" / "repository")).files.put([b"data"])


def test_a_repository_that_is_away_has_not_lost_its_models(local, root, tmp_path):
    """Look-ups say `Unavailable`, never `ModelNotFound`, and go on when it is back."""
    registered = local.register("m", 1, SPEC, put(local))
    root.rename(tmp_path / "away")
    for look in (
        local.versions.manifests,
        lambda: local.versions.manifest("m"),
        lambda: local.versions.manifest("m", 1),
    ):
        with pytest.raises(Unavailable, match="is away"):
            look()
    (tmp_path / "away").rename(root)
    assert local.versions.manifests() == [registered] == [local.versions.manifest("m", 1)]


def test_a_url_that_cannot_be_opened_is_told_without_its_keys():
    """The message names the scheme; a URL may hold a secret."""
    with pytest.raises(InvalidRequest, match="nosuch URL") as caught:
        Repository("nosuch://user:secret@bucket")
    assert "secret" not in str(caught.value)


def test_a_file_url_is_a_directory(tmp_path):
    """`file://` and a path are the same repository."""
    digest = put(Repository(f"file://{tmp_path}/r"))
    assert Repository(str(tmp_path / "r")).files.has(digest)


# --- Triton -----------------------------------------------------------------------------


def test_import_triton(repository, tmp_path):
    """Every version is registered; a broken model is reported and hides no other."""
    triton = tmp_path / "triton"
    for path, data in {
        "good/1/model.pt": torchscript(),
        "good/2/model.pt": torchscript(b"2"),
        "good/3/model.pt": b"not a model",
        "named/1/other.pt": torchscript(),
        "named/config.pbtxt": b'backend: "pytorch" default_model_filename: "other.pt"',
        "onnx/1/model.onnx": b"",
        "onnx/config.pbtxt": b'platform: "onnxruntime_onnx"',
        "no name/1/model.pt": torchscript(),
    }.items():
        target = triton / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    manifests, errors = import_triton(repository, str(triton))
    assert [manifest.id for manifest in manifests] == ["good/1", "good/2", "named/1"]
    assert repository.versions.manifests() == manifests
    assert sorted(errors) == ["good/3", "no name", "onnx"]
    assert "onnxruntime_onnx" in str(errors["onnx"])
    assert import_triton(repository, str(triton))[0] == manifests
