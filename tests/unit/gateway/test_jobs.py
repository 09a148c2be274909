"""The pure part of jobs: ids, ends, turns, files, sweeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.jobs import (
    FAULTS_FORGIVEN,
    SAID_CHARS,
    WAIT_MOST_S,
    Again,
    Ended,
    Found,
    Job,
    JobNotFound,
    Note,
    after_error,
    cancelled,
    check_id,
    deadline_ms,
    decode_ended,
    decode_job,
    decode_note,
    encode_file,
    encode_note,
    ended,
    expired,
    kept_until_ms,
    new_id,
    shard_of,
    sweep,
    view,
)
from shared.errors import Internal, InvalidRequest, Overloaded, Unavailable

HOUR_MS = 3600_000
SECRET = "0123456789abcdef" * 2


def job(**more) -> Job:
    fields = {
        "id": new_id("bert", SECRET),
        "model": "bert",
        "created_ms": 0,
        "deadline_ms": HOUR_MS,
        "nbytes": 3,
    }
    return Job(**(fields | more))


@pytest.mark.parametrize(
    "text", ["", "../../models/x", "8" + SECRET[1:], SECRET + "0", SECRET.upper(), SECRET + "\n"]
)
def test_only_ids_of_ours_become_paths(text):
    """Whatever else a client sends is no job."""
    with pytest.raises(JobNotFound):
        check_id(text)


@given(st.text(min_size=1, max_size=128))
def test_a_models_jobs_lie_together(name):
    """Queue and folder follow from the model, on every gateway alike."""
    assert new_id(name, SECRET)[0] == shard_of(name) == new_id(name, "f" * 32)[0]
    assert check_id(new_id(name, SECRET)) == new_id(name, SECRET)


def test_passing_trouble_is_waited_out_ever_longer():
    """But never longer than the bound, and the note says how often."""
    note, waits = Note(job().id), []
    for _ in range(12):
        next_ = after_error(note, job(), Unavailable("no worker"), now_ms=0, chance=1.0)
        assert isinstance(next_, Again)
        assert next_.note.tries == note.tries + 1
        assert next_.note.faults == 0
        note = next_.note
        waits.append(next_.after_s)
    assert waits == sorted(waits)
    assert waits[0] == 1.0
    assert waits[-1] == WAIT_MOST_S


def test_who_says_when_there_is_room_is_heeded():
    """A `Retry-After` lengthens the wait, within the bound."""
    told = Overloaded("full", retry_after_s=9)
    assert after_error(Note(job().id), job(), told, now_ms=0, chance=0.0).after_s == 9
    told = Overloaded("full", retry_after_s=900)
    assert after_error(Note(job().id), job(), told, now_ms=0, chance=0.0).after_s == WAIT_MOST_S


def test_what_can_never_succeed_is_not_tried_again():
    """A wrong request fails at its first turn, with its own code."""
    end = after_error(Note(job().id), job(), InvalidRequest("no"), now_ms=5, chance=0.5)
    assert (end.state, end.code, end.error, end.ended_ms) == ("failed", "invalid_argument", "no", 5)


def test_faults_of_ours_are_forgiven_a_few_times():
    """They are retryable, but something that always fails must not run all day."""
    note = Note(job().id)
    for _ in range(FAULTS_FORGIVEN):
        next_ = after_error(note, job(), Internal("oh"), now_ms=0, chance=0.5)
        note = next_.note
    end = after_error(note, job(), Internal("oh"), now_ms=0, chance=0.5)
    assert isinstance(end, Ended)
    assert (end.state, end.code) == ("failed", "internal")


def test_a_job_whose_next_turn_would_be_too_late_expires():
    """It says what kept it from its answer."""
    last = HOUR_MS - 400
    end = after_error(Note(job().id), job(), Unavailable("no worker"), now_ms=last, chance=0.0)
    assert isinstance(end, Ended)
    assert (end.state, end.code, end.ended_ms) == ("expired", "deadline_exceeded", HOUR_MS)
    assert "no worker" in end.error


@given(
    tries=st.integers(0, 2000),
    faults=st.integers(0, 9),
    now_ms=st.integers(0, 2 * HOUR_MS),
    chance=st.floats(0, 1),
    retry=st.none() | st.floats(0, 1e6),
    kind=st.sampled_from([Unavailable, Overloaded, Internal, InvalidRequest]),
)
def test_another_turn_begins_before_the_deadline(tries, faults, now_ms, chance, retry, kind):
    """Whatever went wrong: a job either ends, or gets a turn that can still be in time."""
    error = kind("x", retry_after_s=retry)
    next_ = after_error(Note(job().id, tries, faults), job(), error, now_ms=now_ms, chance=chance)
    if isinstance(next_, Again):
        assert 0 < next_.after_s <= WAIT_MOST_S
        assert now_ms + next_.after_s * 1000 < HOUR_MS
    else:
        assert next_.state in {"failed", "expired"}


def test_the_earliest_deadline_counts_and_none_is_beyond_the_most():
    """As for requests that somebody waits for."""

    def deadline(*wished):
        return deadline_ms(wished, now_ms=1000, default_s=60, most_s=100)

    assert deadline() == 61_000
    assert deadline(5.0, 3.0) == 4000
    assert deadline(1e9) == 101_000


def test_what_is_told_of_a_job():
    """A client finds state, times in RFC 3339, its own id, and where the result will be."""
    waiting = job(request_id="mine", version="3", created_ms=1500)
    told = view(waiting, keep_s=60)
    assert told == {
        "id": waiting.id,
        "state": "queued",
        "model_name": "bert",
        "model_version": "3",
        "request_id": "mine",
        "created": "1970-01-01T00:00:01.500Z",
        "deadline": "1970-01-01T01:00:00.000Z",
        "result": f"/v2/jobs/{waiting.id}/result",
    }
    end = ended(job(), "failed", 2000, "model_failed", error="bad luck")
    told = view(end, keep_s=60)
    assert told["state"] == "failed"
    assert (told["code"], told["error"]) == ("model_failed", "bad luck")
    assert told["ended"] == "1970-01-01T00:00:02.000Z"
    assert told["kept_until"] == "1970-01-01T00:01:02.000Z"
    assert kept_until_ms(end, 60) == 62_000
    assert "error" not in view(ended(job(), "succeeded", 2000, "ok"), keep_s=60)


@given(st.binary(max_size=200), st.text(max_size=3000))
def test_files_hold_what_they_were_given(body, said):
    """Also when somebody's error is long: what stands before the answer stays short."""
    assert decode_job(encode_file(job(), body)) == (job(), body)
    end = ended(job(), "failed", 1, "model_failed", headers={"a": 1}, error=said)
    data = encode_file(end, body)
    assert decode_ended(data) == (end, body)
    assert len(data) - len(body) < 16 * 1024
    assert end.error == said[:SAID_CHARS]


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff\xff", encode_file(job(), b"")[:40]])
def test_a_broken_file_is_a_value_error(data):
    """Nothing is made up of half a file."""
    with pytest.raises(ValueError, match=r"."):
        decode_job(data)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'["../x"]', b"[" * 5000])
def test_what_is_no_note_is_refused(data):
    """Anybody who may publish can put anything into a queue."""
    with pytest.raises((InvalidRequest, JobNotFound)):
        decode_note(data)


def test_notes_travel():
    """With how often a job was tried."""
    note = Note(job().id, 3, 1)
    assert decode_note(encode_note(note)) == note


def test_a_sweep_removes_what_is_old_and_finds_what_was_lost():
    """Results past their time, requests of ended jobs, and jobs that had no turn for too long; keys
    that no job can have any more, and those that somebody died freeing."""
    found = [
        Found("old", "ended", 101.0),
        Found("kept", "ended", 99.0),
        Found("half", "ended", 1.0),
        Found("half", "asked", 50.0),
        Found("young", "asked", 10.0),
        Found("lost", "asked", 31.0),
        Found("forgotten", "key", 1131.0),
        Found("held", "key", 1129.0),
        Found("left", "freeing", 31.0),
        Found("freed", "freeing", 29.0),
    ]
    plan = sweep(found, keep_s=100, turn_s=30, longest_s=1000)
    assert (plan.over, plan.settled, plan.quiet) == (["old"], ["half"], ["lost"])
    assert (plan.keys, plan.locks) == (["forgotten"], ["left"])


def test_every_end_by_us_says_why():
    """The result of a job that nobody answered is an error like any other."""
    assert expired(job(), 1).code == "deadline_exceeded"
    assert cancelled(job(), 1).code == "not_found"
    assert expired(job(), 1).error
    assert cancelled(job(), 1).error
