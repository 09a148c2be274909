"""Jobs as files: in a directory, and in a bucket's twin."""

from __future__ import annotations

import threading
import uuid

import pytest

from services.gateway.core.jobs import Job, JobNotFound, cancelled, ended, new_id
from services.gateway.jobs.files import Broken, JobFiles
from shared.storage import open_storage


def job(model: str = "bert") -> Job:
    return Job(
        id=new_id(model, uuid.uuid4().hex), model=model, created_ms=1, deadline_ms=9, nbytes=4
    )


@pytest.fixture(params=["directory", "bucket"])
def files(request, tmp_path):
    if request.param == "directory":
        return JobFiles(open_storage(str(tmp_path)))
    return JobFiles(open_storage(f"memory://jobs-{uuid.uuid4().hex}"))


def test_a_job_waits_until_it_ends(files):
    """Then its request is gone, and its answer there."""
    one = job()
    assert files.find(one.id) is None
    files.create(one, b"what")
    assert files.waiting(one.id) == files.find(one.id) == one
    assert files.request(one.id) == b"what"
    assert files.answer(one.id) is None
    end = ended(one, "succeeded", 5, "ok")
    assert files.end(end, b"that")
    assert files.find(one.id) == end
    assert files.answer(one.id) == (end, b"that")
    assert files.waiting(one.id) is None
    assert files.request(one.id) is None
    files.remove(one.id)
    files.remove(one.id)
    assert files.find(one.id) is None


def test_of_many_ends_the_first_stays(files):
    """Whoever comes later is told so, and changes nothing."""
    one = job()
    files.create(one, b"")
    first: list[int] = []
    barrier = threading.Barrier(8)

    def finish(number: int) -> None:
        barrier.wait()
        if files.end(ended(one, "succeeded", number, "ok"), bytes([number])):
            first.append(number)

    threads = [threading.Thread(target=finish, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = first
    assert files.answer(one.id)[1] == bytes([winner])


def test_an_answer_to_a_removed_job_finds_no_place(files):
    """Else a result that its client has removed would come back."""
    one = job()
    files.create(one, b"")
    files.end(cancelled(one, 2), b"")
    files.remove(one.id)
    assert not files.end(ended(one, "succeeded", 3, "ok"), b"late")
    assert files.find(one.id) is None


def test_an_end_that_was_broken_off_is_an_end(files):
    """Who died between its two steps has decided it; what is left shows in the list."""
    one = job()
    files.create(one, b"")
    files.end(ended(one, "succeeded", 5, "ok"), b"")
    files.create(one, b"")  # as if it had never been removed
    assert files.waiting(one.id) is None
    assert files.find(one.id).state == "succeeded"
    shown = {(found.id, found.kind) for found in files.list(one.id[0])}
    assert shown == {(one.id, "ended"), (one.id, "asked")}
    files.remove_request(one.id)
    assert [found.kind for found in files.list(one.id[0])] == ["ended"]


def test_a_list_is_of_one_shard_and_says_how_old(files):
    """A file that was just written is young."""
    one = job()
    files.create(one, b"")
    other = next(str(shard) for shard in range(8) if str(shard) != one.id[0])
    assert files.list(other) == []
    (found,) = files.list(one.id[0])
    assert -60 < found.age_s < 60


def test_no_path_is_made_of_what_is_no_id(files):
    """Not even below the folder of jobs."""
    for text in ("../x", "0/../../x", "", "0" * 31):
        with pytest.raises(JobNotFound):
            files.find(text)


def test_half_a_file_is_told_apart_from_none(tmp_path):
    """It is a fault, and says so to the log."""
    files = JobFiles(open_storage(str(tmp_path)))
    one = job()
    files.create(one, b"")
    (path,) = tmp_path.rglob("*.asked")
    path.write_bytes(b"\x00\x00\x00\x09half")
    for look in (files.find, files.waiting, files.request):
        with pytest.raises(Broken):
            look(one.id)
