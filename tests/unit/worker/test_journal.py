"""What an agent leaves behind that dies together with its engine."""

from __future__ import annotations

import os

from services.worker.core.events import DeathsFound, KeepDeath
from services.worker.core.worker import WorkerCore
from services.worker.journal import Doomed, Journal
from shared.names import ModelId

A, B = ModelId("a/1"), ModelId("b/1")
FILE = "sha256:1"


def killed(journal: Journal) -> None:
    """As by a kernel: it writes nothing more, and its lock is gone."""
    os.close(journal._file)
    journal._file = None


def opened(path) -> tuple[Journal, list[Doomed]]:
    journal = Journal(str(path))
    return journal, journal.open()


def test_who_dies_as_it_loads_leaves_word(tmp_path):
    """The next one in the same folder is told of the load that was begun first, and nothing of the
    others."""
    journal, found = opened(tmp_path)
    assert found == []
    journal.begun(A, FILE)
    journal.begun(B, FILE)
    killed(journal)
    _, found = opened(tmp_path)
    assert found == [Doomed(A, FILE, 1)]


def test_deaths_add_up_until_it_is_loaded(tmp_path):
    """Once more while it is loaded again: two. One load that ends well: none."""
    for deaths in (1, 2):
        journal, _ = opened(tmp_path)
        journal.begun(A, FILE)
        killed(journal)
        journal, found = opened(tmp_path)
        assert found == [Doomed(A, FILE, deaths)]
        killed(journal)
    journal, _ = opened(tmp_path)
    journal.begun(A, FILE)
    journal.ended(A)
    killed(journal)
    assert opened(tmp_path)[1] == []


def test_another_file_is_not_blamed(tmp_path):
    """Registered anew under the same name, it starts from nothing."""
    journal, _ = opened(tmp_path)
    journal.begun(A, FILE)
    killed(journal)
    journal, _ = opened(tmp_path)
    journal.begun(A, "sha256:2")
    killed(journal)
    assert opened(tmp_path)[1] == [Doomed(A, "sha256:2", 1)]


def test_an_orderly_end_and_a_lost_engine_blame_nobody(tmp_path):
    """In both the agent was there to see what happened."""
    journal, _ = opened(tmp_path)
    journal.begun(A, FILE)
    journal.close()
    journal, found = opened(tmp_path)
    assert found == []
    journal.begun(A, FILE)
    journal.engine_lost()
    killed(journal)
    journal, found = opened(tmp_path)
    assert found == []
    journal.close()
    assert list((tmp_path / "loading").iterdir()) == []


def test_who_lives_is_left_alone(tmp_path):
    """Several workers share a folder: each has its own file, and a dead one's goes to one."""
    living, _ = opened(tmp_path)
    living.begun(A, FILE)
    dead, _ = opened(tmp_path)
    dead.begun(B, FILE)
    killed(dead)
    _, found = opened(tmp_path)
    assert found == [Doomed(B, FILE, 1)]
    _, found = opened(tmp_path)
    assert found == []
    assert len(list((tmp_path / "loading").iterdir())) == 3


def test_what_cannot_be_read_blames_nobody(tmp_path):
    """Half-written, or not ours."""
    journal, _ = opened(tmp_path)
    journal.begun(A, FILE)
    os.pwrite(journal._file, b"{]", 0)
    killed(journal)
    assert opened(tmp_path)[1] == []


def test_without_a_folder_it_does_without(tmp_path):
    """A disk that takes nothing costs no load."""
    (tmp_path / "file").write_bytes(b"")
    journal, found = opened(tmp_path / "file")
    journal.begun(A, FILE)
    journal.ended(A)
    journal.close()
    assert found == []


def test_two_deaths_are_enough_and_one_is_not():
    """One makes a suspect, which is loaded alone; two are written down for all workers."""
    core = WorkerCore()
    assert core.handle([DeathsFound(A, FILE, 1)], 0.0) == []
    assert core.state.get(A).suspect
    actions = core.handle([DeathsFound(B, FILE, 2)], 0.0)
    kept = [action for action in actions if isinstance(action, KeepDeath)]
    assert kept == [KeepDeath(B, "load", "it ended 2 workers as it was loaded")]
    assert core.state.get(B).quarantined
