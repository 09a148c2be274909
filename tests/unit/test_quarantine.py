"""Which deaths are enough to keep a model from all engines, and how they are kept."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ModelNotFound
from shared.models import ModelSpec
from shared.names import ModelId
from shared.quarantine import APART_S, QUARANTINE, Death, Quarantine, verdict
from shared.repository import Repository
from shared.storage import open_storage
from tests.archives import torchscript

MODEL = ModelId("bert/1")


def death(kind="request", at=1000.0, worker="w0", reason="it ended 2 engines") -> Death:
    return Death(kind=kind, worker=worker, at=at, reason=reason)


@pytest.fixture
def quarantine(tmp_path) -> Quarantine:
    return Quarantine(open_storage(str(tmp_path)))


def test_one_load_is_enough():
    """It was tried alone before anybody wrote it down."""
    held = verdict(MODEL, [death("load", reason="it ended 2 engines as it was loaded")])
    assert held is not None
    assert (held.reason, held.worker, held.since) == (
        "it ended 2 engines as it was loaded", "w0", 1000.0,
    )  # fmt: skip
    assert "bert/1 is quarantined: it ended 2 engines" in str(held.error())


def test_two_requests_are_enough_on_whichever_workers():
    """One may be the request's own fault."""
    first, second = death(worker="w1"), death(worker="w2", at=1000.0 + APART_S)
    assert verdict(MODEL, [first]) is None
    held = verdict(MODEL, [second, first])
    assert held is not None
    assert (held.worker, held.deaths) == ("w2", (first, second))


def test_requests_far_apart_do_not_count_together():
    """Over months every model that anybody may ask would end in quarantine."""
    far = death(at=1000.0 + 2 * APART_S)
    assert verdict(MODEL, [death(), far]) is None
    assert verdict(MODEL, [death(), far, death(at=far.at + 1)]) is not None


@given(st.lists(st.tuples(st.sampled_from(["load", "request"]), st.floats(1, 10 * APART_S))))
def test_further_deaths_release_nobody(told):
    """What is quarantined stays so whatever is learned later; the order of learning is nothing."""
    deaths = [death(kind, at) for kind, at in told]
    for known in range(len(deaths) + 1):
        if verdict(MODEL, deaths[:known]) is not None:
            assert verdict(MODEL, deaths) is not None
    assert verdict(MODEL, deaths) == verdict(MODEL, deaths[::-1])


def test_what_is_written_down_is_seen_by_all(quarantine, tmp_path):
    """Also by who has looked before, and after every restart."""
    other = Quarantine(open_storage(str(tmp_path)))
    assert other.held() == {}
    quarantine.add(MODEL, death(worker="w1"))
    assert other.held() == {}
    quarantine.add(MODEL, death(worker="w2", at=1001.0))
    quarantine.add(ModelId("gpt/2"), death("load"))
    for looks in (quarantine, other, Quarantine(open_storage(str(tmp_path)))):
        assert set(looks.held()) == {MODEL, "gpt/2"}
        assert [each.worker for each in looks.held()[MODEL].deaths] == ["w1", "w2"]


def test_a_single_one_that_is_long_past_is_removed(quarantine, tmp_path):
    """As the next one is written down: the folder does not grow for ever."""
    for n in range(5):
        quarantine.add(MODEL, death(at=1000.0 + n * 2 * APART_S))
    assert quarantine.of(MODEL) is None
    assert len(list((tmp_path / QUARANTINE).iterdir())) == 1


def test_who_is_released_starts_anew(quarantine):
    """One more request is then one request, not the third."""
    quarantine.add(MODEL, death())
    quarantine.add(MODEL, death(at=1001.0))
    assert quarantine.forget(MODEL) is True
    assert quarantine.forget(MODEL) is False
    quarantine.add(MODEL, death(at=1002.0))
    assert quarantine.held() == {}


@pytest.mark.parametrize(
    "name",
    ["../x@1@5-00000000.json", "bert@0@5-00000000.json", "bert@1@5-0000000g.json", "notes.txt"],
)
def test_what_is_not_ours_is_left_alone(quarantine, tmp_path, name):
    """Somebody's notes quarantine nobody; nor does a file that broke."""
    folder = tmp_path / QUARANTINE
    folder.mkdir()
    (folder / name.replace("/", "_")).write_bytes(msgspec.json.encode(death("load")))
    (folder / "bert@1@5-00000000.json").write_bytes(b'{"kind":"load"')
    assert quarantine.held() == {}
    assert (folder / name.replace("/", "_")).exists()


def test_the_reason_is_cut(quarantine):
    """It is told to everybody who asks."""
    quarantine.add(MODEL, death("load", reason="x" * 100_000))
    assert len(quarantine.held()[MODEL].reason) == 500


def registered(tmp_path, versions=2) -> Repository:
    repository = Repository(str(tmp_path))
    for n in range(versions):
        digest, _ = repository.files.put([torchscript(b"%d" % n * 16)])
        repository.register("bert", n + 1, ModelSpec(), digest)
    return repository


def test_a_version_or_all_of_a_model_are_released(tmp_path):
    """Told is which were in quarantine."""
    repository = registered(tmp_path)
    for model in ("bert/1", "bert/2"):
        repository.add_death(ModelId(model), death("load"))
    assert repository.release("bert", 2) == ["bert/2"]
    assert repository.release("bert") == ["bert/1"]
    assert repository.release("bert") == []
    for name, version in (("bert", 3), ("gpt", None)):
        with pytest.raises(ModelNotFound):
            repository.release(name, version)


def test_a_removed_version_leaves_nothing(tmp_path):
    """Should it come back, it starts anew."""
    repository = registered(tmp_path)
    repository.add_death(ModelId("bert/2"), death("load"))
    repository.remove("bert", 2)
    assert repository.quarantined() == {}
    assert not list((tmp_path / QUARANTINE).iterdir())
