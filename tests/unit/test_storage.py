from __future__ import annotations

import io
import shutil
import uuid

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from shared.errors import Unavailable
from shared.storage import open_storage
from shared.storage.remote import RemoteStorage


class Bucket(LocalFileSystem):
    """Commits uploads as a bucket's file system does: whole, at the end."""

    protocol = "s3"


class Broken(io.BytesIO):
    """Ends in the middle of an upload."""

    def read(self, size=-1):
        if self.tell():
            raise OSError(5, "the line is down")
        return super().read(4)


class Hiccup(MemoryFileSystem):
    """Fails as drivers of services do: with exceptions of their own."""

    def __getattribute__(self, name):
        if name in {"cat_file", "cat", "open", "info", "find", "pipe_file", "rm_file", "rm"}:
            raise EndpointError("503 SlowDown")
        return super().__getattribute__(name)


class EndpointError(Exception):
    """Stands for a driver's own exception."""


@pytest.fixture(params=["bucket", "memory"])
def remote(request, tmp_path):
    if request.param == "bucket":
        return RemoteStorage(Bucket(auto_mkdir=True), str(tmp_path / "root"))
    return open_storage(f"memory://{uuid.uuid4().hex}")


def test_an_upload_appears_whole(remote):
    """A staged file has no name until it is published; then it has all its bytes."""
    stage = remote.stage()
    stage.write(b"first ")
    stage.write(memoryview(b"second"))
    assert remote.find("folder", 0) == []
    stage.publish("folder/file")
    assert remote.read("folder/file") == b"first second"
    assert [entry.path for entry in remote.find("folder", 0)] == ["folder/file"]
    assert remote.find("tmp", 0) == []


def test_an_upload_that_breaks_leaves_nothing(remote):
    """A failure in the middle is told, and neither half a file nor a temporary one stays."""
    with pytest.raises(Unavailable, match="the line is down"):
        remote.upload(Broken(b"0123456789"), "folder/file")
    with pytest.raises(FileNotFoundError):
        remote.entry("folder/file")
    assert remote.find("tmp", 0) == []


def test_create_lets_one_win(remote):
    """The second writer of a path is told, and changes nothing."""
    remote.create("folder/file", b"first")
    with pytest.raises(FileExistsError):
        remote.create("folder/file", b"second")
    assert remote.read("folder/file") == b"first"


def test_an_upload_that_was_left_behind_is_swept():
    """Where uploads have temporary names, old ones are removed by their age."""
    name = uuid.uuid4().hex
    fsspec.filesystem("memory").pipe_file(f"/{name}/tmp/left", b"half")
    storage = open_storage(f"memory://{name}")
    assert storage.sweep(3600.0) == 0
    assert storage.sweep(0.0) == 1
    assert storage.find("tmp", 0) == []


def test_read_many_leaves_out_what_is_gone(remote, tmp_path):
    """Files that vanish between listing and reading are left out."""
    for storage in (remote, open_storage(str(tmp_path / "local"))):
        storage.replace("a", b"1")
        assert storage.read_many(["a", "b"]) == {"a": b"1"}
        assert storage.read_many([]) == {}


@pytest.mark.parametrize(
    "act",
    [
        lambda storage: storage.read("a"),
        lambda storage: storage.read_many(["a"]),
        lambda storage: storage.open("a"),
        lambda storage: storage.entry("a"),
        lambda storage: storage.find("models", 2),
        lambda storage: storage.create("a", b""),
        lambda storage: storage.replace("a", b""),
        lambda storage: storage.touch("a"),
        lambda storage: storage.remove("a"),
        lambda storage: storage.remove_tree("a"),
        lambda storage: storage.sweep(0.0),
        lambda storage: storage.stage().publish("a"),
    ],
)
def test_a_drivers_own_exception_is_unavailable(act):
    """Whatever a bucket's driver raises, the caller hears that the repository is away."""
    storage = RemoteStorage(Hiccup(skip_instance_cache=True), "/root")
    with pytest.raises(Unavailable, match="503 SlowDown"):
        act(storage)


def test_a_connection_that_breaks_while_a_file_is_read_is_unavailable(remote):
    """An open file's reads end in the same error as everything else."""
    remote.create("a", b"0123456789")
    remote._fs = Breaking(remote._fs)
    remote._shared_handles = False
    with remote.open("a") as file:
        assert file.read(4) == b"0123"
        assert file.seek(0) == file.tell() == 0
        assert file.seekable()
        with pytest.raises(Unavailable, match="503 SlowDown"):
            file.read()


class Breaking:
    """A file system whose files cannot be read to their end."""

    def __init__(self, inner):
        self._inner = inner

    def open(self, path, mode):
        file = self._inner.open(path, mode)
        read = file.read

        def some(size=-1):
            if size < 0:
                raise EndpointError("503 SlowDown")
            return read(size)

        file.read = some
        return file


@pytest.mark.parametrize("folder", ["", "models"])
def test_a_folder_that_is_away_is_not_an_empty_one(tmp_path, folder):
    """A file share that is lost for a moment: nobody may take that for "all was removed", and
    nobody may write a new repository in its place."""
    root, away = tmp_path / "root", tmp_path / "away"
    storage = open_storage(str(root))
    storage.create("models/m/1/manifest.json", b"{}")
    assert storage.find("models", 2)
    (root / folder).rename(away)
    with pytest.raises(Unavailable, match="is away"):
        storage.find("models", 2)
    with pytest.raises(Unavailable, match="is away"):
        storage.find("models/m", 1)
    with pytest.raises(Unavailable, match="is away"):
        storage.read("models/m/1/manifest.json")
    with pytest.raises(Unavailable, match="is away"):
        storage.entry("models/m/1/manifest.json")
    with pytest.raises(Unavailable, match="is away"):
        storage.create("models/m/2/manifest.json", b"{}")
    away.rename(root / folder)
    assert [entry.path for entry in storage.find("models", 2)] == ["models/m/1/manifest.json"]


def test_a_cache_may_be_emptied(tmp_path):
    """Whoever cleans up below it, or removes it, only makes it fetch again."""
    storage = open_storage(str(tmp_path / "cache"), durable=False)
    for folder in ("cache/blobs", "cache"):
        storage.replace("blobs/ab", b"1")
        assert storage.read("blobs/ab") == b"1"
        shutil.rmtree(tmp_path / folder)
        with pytest.raises(FileNotFoundError):
            storage.entry("blobs/ab")
    assert storage.find("blobs", 0) == []


def test_a_file_beside_the_folders_may_go(tmp_path):
    """Only folders are expected to stay."""
    storage = open_storage(str(tmp_path))
    storage.replace("a", b"1")
    assert storage.read("a") == b"1"
    storage.remove("a")
    with pytest.raises(FileNotFoundError):
        storage.read("a")


def test_a_fresh_directory_is_an_empty_storage(tmp_path):
    """It is made at once, so that from then on its absence means something."""
    storage = open_storage(str(tmp_path / "new" / "root"))
    assert storage.find("models", 2) == []
    with pytest.raises(FileNotFoundError):
        storage.read("models/m/1/manifest.json")
    (tmp_path / "new" / "root").rmdir()
    with pytest.raises(Unavailable, match="is away"):
        storage.find("models", 2)
