from __future__ import annotations

import io
import uuid

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from shared.errors import Unavailable
from shared.storage import open_storage
from shared.storage_remote import RemoteStorage


class Bucket(LocalFileSystem):
    """Commits uploads as a bucket's file system does: whole, at the end."""

    protocol = "s3"


class Broken(io.BytesIO):
    """Ends in the middle of an upload."""

    def read(self, size=-1):
        if self.tell():
            raise OSError(5, "the line is down")
        return super().read(4)


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
