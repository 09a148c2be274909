"""A registry that is looked through again and again."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from shared.listing import Listing
from shared.models import ModelSpec
from shared.repository import Repository
from shared.storage import Storage, open_storage
from tests.archives import torchscript


class Reading:
    """A storage that counts what is read of it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.read: list[str] = []

    def find(self, *where):
        return self._storage.find(*where)

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        contents = self._storage.read_many(paths)
        self.read += contents
        return contents


@pytest.fixture
def repository(tmp_path):
    return Repository(str(tmp_path))


def register(repository, *names, **fields):
    digest, _ = repository.files.put([torchscript(b"x" * 64)])
    for name in names:
        repository.register(name, None, ModelSpec(**fields), digest)


def test_only_what_has_changed_is_read(repository, tmp_path):
    """A second look reads nothing, one after a registration that manifest alone; what was removed
    is gone."""
    register(repository, "a", "b")
    storage = Reading(open_storage(str(tmp_path)))
    listing = Listing(storage, lambda _: True)
    assert [manifest.id for manifest in listing.look()] == ["a/1", "b/1"]
    storage.read.clear()
    assert len(listing.look()) == 2
    assert storage.read == []
    register(repository, "a")
    repository.remove("b")
    assert listing.look() == repository.versions.manifests()
    assert all(path.startswith("models/a/") for path in storage.read)


def test_of_what_is_not_wanted_nothing_is_kept(repository, tmp_path):
    """It is not read again either."""
    register(repository, *(f"idle-{n}" for n in range(300)))
    register(repository, "kept", min_copies=1)
    storage = Reading(open_storage(str(tmp_path)))
    listing = Listing(storage, lambda manifest: manifest.min_copies > 0)
    assert [manifest.id for manifest in listing.look()] == ["kept/1"]
    assert len(storage.read) == 301
    assert [manifest.id for manifest in listing.look()] == ["kept/1"]
    assert len(storage.read) == 301
    assert [manifest.id for manifest in repository.versions.standing()] == ["kept/1"]


def test_a_broken_manifest_is_told_once(repository, tmp_path, capsys):
    """And hides nobody else."""
    register(repository, "a", "b")
    (tmp_path / "models" / "a" / "1" / "manifest.json").write_text("{")
    for _ in range(3):
        assert [manifest.id for manifest in repository.versions.manifests()] == ["b/1"]
    assert capsys.readouterr().out.count("manifest_skipped") == 1
