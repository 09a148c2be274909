"""Where aliases lead, when they may flip, and what becomes of two writers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.aliases import (
    MAX_ALIASES,
    Alias,
    Aliases,
    Pending,
    check_alias,
    check_split,
    heaviest,
    missing,
    most_copies,
    needed,
)
from shared.aliasfiles import ALIASES, AliasFolder
from shared.errors import Conflict, InvalidRequest, ModelNotFound
from shared.models import Manifest, ModelSpec
from shared.repository import Repository
from shared.storage import open_storage
from tests.archives import torchscript

PROD = Aliases(3, {"prod": Alias({1: 1})})


@pytest.fixture(params=["directory", "memory"])
def storage(request, tmp_path):
    if request.param == "directory":
        return open_storage(str(tmp_path))
    return open_storage(f"memory://{tmp_path.name}")


@pytest.fixture
def repository(tmp_path):
    """With versions 1, 2 and 3 of the model `m`."""
    made = Repository(str(tmp_path))
    for number in (1, 2, 3):
        digest, _ = made.files.put([torchscript(b"%d" % number * 8)])
        made.register("m", None, ModelSpec(), digest)
    return made


@pytest.mark.parametrize("name", ["prod", "a", "a-b_1", "x" * 63, "default"])
def test_names_that_an_alias_can_have(name):
    """They are given back as they are."""
    assert check_alias(name) == name


@pytest.mark.parametrize("name", ["", "1", "Prod", "a.b", "-a", "a/b", "x" * 64, "a\n", "é"])
def test_names_that_no_alias_can_have(name):
    """A number is a version, always."""
    with pytest.raises(InvalidRequest):
        check_alias(name)


def test_a_split_has_no_version_without_a_weight():
    """Weight 0 leaves one out; nothing but zeros is no split, nor is what has no number."""
    assert check_split({2: 0, 1: 5}) == {1: 5}
    for wrong in ({}, {1: 0}, {0: 1}, {1: -1}, {1: 1_000_001}, dict.fromkeys(range(1, 18), 1)):
        with pytest.raises(InvalidRequest):
            check_split(wrong)


def test_the_heaviest_stands_for_a_split():
    """Of equals the lowest, which is the older one."""
    assert heaviest({1: 10, 2: 90}) == 2
    assert heaviest({3: 50, 2: 50}) == 2


def test_a_new_alias_has_nothing_to_wait_for():
    """It leads to its version at once."""
    made = Aliases().lead("prod", {2: 1}, 3, 10.0)
    assert made.aliases == {"prod": Alias({2: 1})}


def test_a_changed_alias_waits():
    """What it leads to stays until the flip; asking for the same again starts no new wait, and
    asking for what is there ends it."""
    pending = PROD.lead("prod", {2: 1}, 3, 10.0)
    assert pending.aliases["prod"] == Alias({1: 1}, Pending({2: 1}, 10.0))
    assert pending.lead("prod", {2: 1}, 3, 20.0) == pending
    assert pending.lead("prod", {1: 1}, 3, 20.0) == PROD
    assert pending.flip("prod").aliases["prod"] == Alias({2: 1})
    assert PROD.flip("prod") == PROD
    assert PROD.flip("other") == PROD
    assert PROD.lead("prod", {2: 1}, 3, 10.0, at_once=True).aliases["prod"] == Alias({2: 1})


def test_the_first_default_takes_over_from_the_newest():
    """The bare name has led to the newest version so far: it is not turned to a cold one."""
    made = Aliases().lead("default", {1: 1}, 3, 10.0)
    assert made.aliases["default"] == Alias({3: 1}, Pending({1: 1}, 10.0))
    assert Aliases().lead("default", {3: 1}, 3, 10.0).aliases["default"] == Alias({3: 1})


def test_a_removed_alias_leaves_its_name():
    """So that whoever made a route of it finds it; made anew it is one like others."""
    gone = PROD.without("prod")
    assert gone.aliases == {}
    assert gone.gone == ("prod",)
    assert gone.lead("prod", {2: 1}, 3, 10.0).gone == ()


def test_there_are_only_so_many_aliases():
    """Of one model."""
    full = Aliases(1, {f"a{n}": Alias({1: 1}) for n in range(MAX_ALIASES)})
    with pytest.raises(InvalidRequest, match="at most"):
        full.lead("more", {1: 1}, 1, 0.0)


@pytest.mark.parametrize(
    ("present", "to", "bound", "needs"),
    [
        ({1: 1}, {2: 1}, {}, {2: 0}),
        ({1: 1}, {2: 1}, {1: 2, 2: 1}, {2: 2}),
        ({1: 1}, {2: 1}, {1: 9}, {2: 4}),
        ({1: 1}, {1: 90, 2: 10}, {1: 3}, {1: 3, 2: 1}),
        ({1: 50, 2: 50}, {2: 1}, {1: 1, 2: 1}, {2: 2}),
        ({1: 1}, {3: 1}, {1: 3}, {3: 1}),
    ],
    ids=["cold", "as often", "there are four workers", "shares", "both", "max_copies"],
)
def test_what_a_flip_needs(present, to, bound, needs):
    """As many bindings as there are now, in the shares of the new split, as far as can be."""
    most = {1: 4, 2: 4, 3: 1}
    assert needed(Alias(present, Pending(to, 0.0)), bound, most) == needs


def test_what_is_missing_is_told():
    """In words; nothing when all is there."""
    assert missing({2: 2, 3: 1}, {2: 1, 3: 1}) == ["version 2 has 1 of 2 bindings"]
    assert missing({2: 2}, {2: 3}) == []
    assert needed(Alias({1: 1}), {1: 1}, {1: 4}) == {}


def test_how_many_copies_there_can_be():
    """Not more than workers, than `max_copies`, than one of a model with a state."""
    manifest = Manifest(name="m", version=1, digest="", size_bytes=0, created_at=0.0)
    assert most_copies(manifest, 4) == 4
    assert most_copies(Manifest(**_fields(manifest, max_copies=2)), 4) == 2
    assert most_copies(Manifest(**_fields(manifest, stateful=True)), 4) == 1
    assert most_copies(Manifest(**_fields(manifest, stateful=True)), 0) == 0


def _fields(manifest, **over):
    return {f: getattr(manifest, f) for f in manifest.__struct_fields__} | over


def test_documents_come_back_as_written(storage):
    """With the next revision; of a model without any, an empty one."""
    folder = AliasFolder(storage)
    assert folder.read("m") == Aliases()
    assert folder.read_all() == {}
    written = folder.write("m", Aliases().lead("prod", {1: 90, 2: 10}, 2, 0.0))
    written = folder.write("m", written.lead("prod", {2: 1}, 2, 5.0))
    assert written.revision == 2
    assert folder.read("m") == written
    assert folder.read_all() == {"m": written}
    assert AliasFolder(storage).read_all() == {"m": written}


def test_of_two_writers_one_loses(storage):
    """What is refused has changed nothing."""
    folder = AliasFolder(storage)
    first = folder.write("m", Aliases().lead("prod", {1: 1}, 1, 0.0))
    won = folder.write("m", first.lead("prod", {2: 1}, 1, 0.0, at_once=True))
    with pytest.raises(Conflict, match="beyond revision 1"):
        folder.write("m", first.lead("prod", {3: 1}, 1, 0.0, at_once=True))
    assert folder.read("m") == won


def test_old_revisions_go(storage):
    """All but the last two: who has listed the folder a moment ago finds what it listed."""
    folder = AliasFolder(storage)
    document = Aliases()
    for number in range(1, 8):
        document = folder.write("m", document.lead("prod", {number: 1}, 1, 0.0, at_once=True))
    files = sorted(entry.path for entry in storage.find(ALIASES, 0))
    assert files == [f"{ALIASES}/m@6.json", f"{ALIASES}/m@7.json"]


def test_a_broken_document_leaves_the_one_before_it(storage):
    """Rather than that names lead anywhere else; and the next one takes its place."""
    folder = AliasFolder(storage)
    first = folder.write("m", Aliases().lead("prod", {1: 1}, 1, 0.0))
    for broken in (b"{", b'{"aliases": {"prod": {"split": {"0": 1}}}}', b'{"aliases": 5}'):
        storage.replace(f"{ALIASES}/m@2.json", broken)
        seen = folder.read("m")
        assert seen.aliases == first.aliases
        assert seen.revision == 2
        assert AliasFolder(storage).read_all() == {"m": seen}
    assert folder.write("m", seen.without("prod")).revision == 3
    for name in ("readme.txt", "m@0.json", "m@x.json", "@1.json", "..odd..@1.json"):
        storage.create(f"{ALIASES}/{name}", b"{}")
    assert AliasFolder(storage).read_all().keys() == {"m"}


def test_edits_of_many_threads_all_count(repository):
    """Whoever loses does it again on what has become of it."""
    barrier = threading.Barrier(8)

    def add(number):
        barrier.wait()
        return repository.edit_aliases("m", lambda d: d.lead(f"a{number}", {1: 1}, 3, 0.0))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    document = repository.aliases()["m"]
    assert document.revision == 8
    assert document.aliases.keys() == {f"a{n}" for n in range(8)}


def test_an_edit_of_what_was_seen_before_is_refused(repository):
    """As the revision says; an edit that changes nothing writes nothing."""
    first = repository.edit_aliases("m", lambda d: d.lead("prod", {1: 1}, 3, 0.0))
    assert repository.edit_aliases("m", lambda d: d, first.revision) == first
    repository.edit_aliases("m", lambda d: d.without("prod"), first.revision)
    with pytest.raises(Conflict, match="at revision 2, not at 1"):
        repository.edit_aliases("m", lambda d: d.without("prod"), first.revision)


def test_aliases_lead_to_what_is_there(repository):
    """A version, or a model, that is not registered is refused."""
    with pytest.raises(ModelNotFound, match="version 9"):
        repository.edit_aliases("m", lambda d: d.lead("prod", {1: 1, 9: 1}, 3, 0.0))
    with pytest.raises(ModelNotFound):
        repository.edit_aliases("other", lambda d: d.lead("prod", {1: 1}, 3, 0.0))
    assert repository.aliases() == {}


def test_a_version_that_an_alias_uses_stays(repository):
    """Also one that is only pending; others can go."""
    repository.edit_aliases("m", lambda d: d.lead("prod", {1: 1}, 3, 0.0))
    repository.edit_aliases("m", lambda d: d.lead("prod", {2: 1}, 3, 0.0))
    for version in (1, 2):
        with pytest.raises(Conflict, match="alias 'prod'"):
            repository.remove("m", version)
    repository.remove("m", 3)
    assert repository.versions.numbers("m") == [1, 2]


def test_a_removed_model_takes_its_aliases_along(repository):
    """One that is registered anew under the name begins without, but not at revision 0: whoever
    has looked before must not take the new ones for what it saw."""
    repository.edit_aliases("m", lambda d: d.lead("prod", {1: 1}, 3, 0.0))
    repository.remove("m")
    assert repository.aliases()["m"] == Aliases(2)
