"""Idempotency keys: their form, their names, who has one; in a directory, in a bucket's twin."""

from __future__ import annotations

import threading
import uuid

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.jobkeys import (
    Claim,
    decode_claim,
    encode_claim,
    fingerprint_of,
    key_name,
    parse_key,
)
from services.gateway.core.jobs import (
    Job,
    JobNotFound,
    check_id,
    decode_job,
    ended,
    new_id,
    shard_of,
)
from services.gateway.jobs.files import JobFiles
from services.gateway.jobs.keys import JobKeys
from shared.errors import InvalidRequest, Unavailable
from shared.names import IDEMPOTENCY_KEY_CHARS
from shared.storage import open_storage

KEEP_S = 3600.0
NAME = key_name("bert", None, "", "k")
visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=255)


def job() -> Job:
    return Job(
        id=new_id("bert", uuid.uuid4().hex), model="bert", created_ms=1, deadline_ms=9, nbytes=0,
        key=NAME, fingerprint="f",
    )  # fmt: skip


def claim_of(one: Job) -> Claim:
    return Claim(one.id, one.fingerprint)


@pytest.fixture(params=["directory", "bucket"])
def files(request, tmp_path):
    if request.param == "directory":
        return JobFiles(open_storage(str(tmp_path)))
    return JobFiles(open_storage(f"memory://jobs-{uuid.uuid4().hex}"))


@pytest.fixture
def keys(files):
    return JobKeys(files, KEEP_S)


@given(visible)
def test_a_key_is_the_same_with_quotes_and_without(key):
    """RFC 8941 wants quotes, and hardly a client sends them."""
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    assert parse_key(quoted) == key
    assert parse_key(f" {quoted}\t") == key
    if not key.startswith('"'):
        assert parse_key(key) == key


@pytest.mark.parametrize(
    "text",
    ["", " ", '""', '"', '"a', "a b", '"a b"', '"a"b', '"a";p=1', '"a\\b"', '"a\\"', "\x7f", "ü",
     "a\nb", "a" * (IDEMPOTENCY_KEY_CHARS + 1), '"' + "a" * (IDEMPOTENCY_KEY_CHARS + 1) + '"',
     "\x00", "a\n"],
)  # fmt: skip
def test_what_is_no_key_is_refused_and_not_repeated(text):
    """An error's message may be logged somewhere; a key leads to somebody's job."""
    with pytest.raises(InvalidRequest) as caught:
        parse_key(text)
    assert len(text) < 3 or text not in caught.value.message


@given(
    st.tuples(st.text(max_size=5), st.none() | st.text(max_size=5), st.text(max_size=5), visible),
    st.tuples(st.text(max_size=5), st.none() | st.text(max_size=5), st.text(max_size=5), visible),
)
def test_names_differ_when_anything_does(one, other):
    """Model, version as addressed, tenant, key: however they are cut, none is taken for another."""
    assert (key_name(*one) == key_name(*other)) == (one == other)
    assert check_id(key_name(*one))[0] == shard_of(one[0])


def test_versions_tenants_and_keys_do_not_run_into_each_other():
    """`a` and `bc` is not `ab` and `c`; no version is not an empty one."""
    names = {
        key_name("m", version, tenant, key)
        for version in (None, "", "1", "1a")
        for tenant in ("", "a", "ab")
        for key in ("a", "b", "ab")
    }
    assert len(names) == 4 * 3 * 3


@pytest.mark.parametrize(
    "other", [(b"bodx", 3, "s"), (b"body", None, "s"), (b"body", 3, ""), (b"body", 30, "s")]
)
def test_a_fingerprint_tells_requests_apart(other):
    """By all that decides the answer."""
    assert fingerprint_of(b"body", 3, "s") != fingerprint_of(*other)
    assert fingerprint_of(b"body", 3, "s") == fingerprint_of(b"body", 3, "s")


def test_claims_travel_and_rubbish_does_not():
    """What a key leads to becomes part of a path."""
    claim = claim_of(job())
    assert decode_claim(encode_claim(claim)) == claim
    for data in (b"", b"{}", b'{"z":' + b"[" * 5000):
        with pytest.raises(ValueError, match=r"."):
            decode_claim(data)
    with pytest.raises(JobNotFound):
        decode_claim(b'{"id":"../../models/x","fingerprint":""}')


def test_a_job_of_an_earlier_release_has_no_key():
    """Its file is read as ever."""
    fields = {"id": job().id, "model": "bert", "created_ms": 1, "deadline_ms": 2, "nbytes": 1}
    head = msgspec.json.encode(fields)
    read, body = decode_job(len(head).to_bytes(4, "big") + head + b"x")
    assert (read.key, read.fingerprint, body) == ("", "", b"x")


def test_the_first_to_claim_a_key_has_it(files, keys):
    """Also when it asks again; everybody else is told who."""
    one, other = job(), job()
    files.create(one, b"")
    files.create(other, b"")
    assert keys.holder(NAME) is None
    assert keys.claim(NAME, claim_of(one)) == claim_of(one)
    assert keys.claim(NAME, claim_of(other)) == claim_of(one)
    assert keys.claim(NAME, claim_of(one)) == keys.holder(NAME) == claim_of(one)


def test_of_many_claims_one_is_right(files, keys):
    """Whoever comes at the same moment learns the same."""
    told: list[str] = []
    barrier = threading.Barrier(8)

    def claim() -> None:
        mine = job()
        files.create(mine, b"")
        barrier.wait()
        told.append(keys.claim(NAME, claim_of(mine)).id)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 8
    assert set(told) == {keys.holder(NAME).id}


def test_a_key_goes_with_its_job_and_before_it(files, keys):
    """Removing, by a client or in time, frees it; an end does not."""
    one = job()
    files.create(one, b"")
    keys.claim(NAME, claim_of(one))
    files.end(ended(one, "succeeded", 5, "ok"), b"")
    assert files.key(NAME) == claim_of(one)
    files.remove(one.id)
    assert files.key(NAME) is None
    assert files.list(one.id[0]) == []


def test_a_key_whose_job_is_over_is_free(files, keys):
    """Before a sweep comes by; and one whose job is gone in whatever way."""
    one = job()
    files.create(one, b"")
    keys.claim(NAME, claim_of(one))
    files.end(ended(one, "succeeded", 5, "ok"), b"")  # in 1970
    assert keys.holder(NAME) is None
    assert files.key(NAME) is None
    assert files.claim(NAME, claim_of(job()))  # of a job that nobody has stored
    assert keys.holder(NAME) is None


def test_a_job_that_goes_late_does_not_take_the_next_ones_key(files, keys):
    """Somebody looked at the key long ago, and removes its old job now."""
    old, new = job(), job()
    for one in (old, new):
        files.create(one, b"")
    keys.claim(NAME, claim_of(old))
    assert files.free(NAME, old.id)
    keys.claim(NAME, claim_of(new))
    assert files.free(NAME, old.id)
    files.remove(old.id)
    assert keys.holder(NAME) == claim_of(new)


def test_while_somebody_frees_a_key_nobody_else_does(files, keys):
    """Whoever wants it is told to come again; whoever removes the job need not wait. After a death
    the sweep unlocks it."""
    one = job()
    files.create(one, b"")
    keys.claim(NAME, claim_of(one))
    files.end(ended(one, "succeeded", 5, "ok"), b"")
    lock = f"jobs/{one.id[0]}/{one.id}.freeing"
    files._storage.create(lock, b"")
    assert not files.free(NAME, one.id)
    with pytest.raises(Unavailable):
        keys.claim(NAME, claim_of(job()))
    files.remove(one.id)
    assert {found.kind for found in files.list(one.id[0])} == {"key", "freeing"}
    files.unlock(one.id)
    assert keys.holder(NAME) is None
    assert files.list(one.id[0]) == []


def test_a_broken_key_leads_nowhere(tmp_path):
    """It is a fault, which the log has; jobs go on."""
    files = JobFiles(open_storage(str(tmp_path)))
    one = job()
    files.create(one, b"")
    for rubbish in (b"\xff", b'{"id":"../x","fingerprint":""}'):
        files.claim(NAME, claim_of(one))
        (path,) = tmp_path.rglob("*.key")
        path.write_bytes(rubbish)
        assert files.key(NAME) is None
    assert JobKeys(files, KEEP_S).claim(NAME, claim_of(one)) == claim_of(one)


class Interrupted:
    """A storage that does something else right before it does this to a file."""

    def __init__(self, storage, doing: str, ending: str, meanwhile) -> None:
        self._storage = storage
        self._point = doing, ending
        self._meanwhile = [meanwhile]

    def __getattr__(self, name):
        call = getattr(self._storage, name)

        def interrupted(path, *more):
            if (name, path[path.rindex(".") :]) == self._point and self._meanwhile:
                self._meanwhile.pop()()
            return call(path, *more)

        return interrupted


@pytest.mark.parametrize("point", [("create", ".freeing"), ("remove", ".key")])
@pytest.mark.parametrize("freeing", ["by removing", "by coming again"])
def test_whoever_frees_a_key_slowly_takes_it_from_nobody(files, keys, point, freeing):
    """Another one frees it meanwhile, and a third has it: then it stays with that. Or they are told
    to come again."""
    old, new = job(), job()
    for one in (old, new):
        files.create(one, b"")
    keys.claim(NAME, claim_of(old))
    files.end(ended(old, "succeeded", 5, "ok"), b"")
    told = []

    def meanwhile() -> None:
        try:
            told.append(keys.claim(NAME, claim_of(new)))
        except Unavailable:
            told.append(None)

    slow = JobFiles(Interrupted(files._storage, *point, meanwhile))
    if freeing == "by removing":
        slow.remove(old.id)
        holder = keys.holder(NAME)
    else:
        holder = JobKeys(slow, KEEP_S).holder(NAME)
    assert len(told) == 1
    assert told[0] in {None, claim_of(new)}
    assert holder in (told[0], None)
    assert keys.holder(NAME) == told[0]
