"""`Idempotency-Key`: a job that is submitted again is the job that there is."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest

from services.gateway.app import run
from services.gateway.config import GatewayConfig
from services.gateway.core.jobkeys import Claim, fingerprint_of, key_name
from services.gateway.core.jobs import Job, Note, encode_note, new_id, queue_of, shard_of
from services.gateway.jobs.files import JobFiles
from services.gateway.jobs.sweep import JobSweep
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import Message, PublishUncertain
from shared.errors import STATUS, IdempotencyKeyReused, from_code
from shared.storage import open_storage
from shared.store.memory import MemoryStore
from tests.gateway_rig import JSON_BODY, another_gateway, running, until

QUEUE = queue_of(shard_of("adder"))
KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"
BODY = msgspec.json.encode(JSON_BODY)
OTHER = msgspec.json.encode({**JSON_BODY, "id": "r2"})


@pytest.fixture
async def rig(tmp_path):
    """A gateway that takes jobs and runs them."""
    async with running(tmp_path) as made:
        yield made


@pytest.fixture
async def accepting(tmp_path):
    """A gateway that takes jobs and runs none."""
    async with running(tmp_path, job_prefetch=0) as made:
        yield made


async def submit(rig, body=BODY, key=KEY, http=None, address="adder", **headers):
    headers = {"Idempotency-Key": key} | headers
    url = f"/v2/models/{address}/jobs"
    return await (http or rig.http).post(url, content=body, headers=headers)


async def accepted(rig, *args, **options) -> str:
    answer = await submit(rig, *args, **options)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v2/jobs/{answer.json()['id']}"
    return answer.json()["id"]


async def ended(rig, id_, http=None, **headers) -> dict:
    """The job, once it has ended."""
    told = {}

    async def over() -> bool:
        nonlocal told
        answer = await (http or rig.http).get(f"/v2/jobs/{id_}", headers=headers)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        return told["state"] != "queued"

    await until(over, 30)
    return told


async def settled(rig, *https) -> None:
    """Until no turn waits and none is under way."""

    async def quiet() -> bool:
        for http in https or (rig.http,):
            text = (await http.get("/metrics")).text
            if "\nroost_gateway_running_jobs 0.0" not in text:
                return False
        return await rig.worker.broker.depth(QUEUE) == 0

    await until(quiet, 30)


def kinds(rig) -> list[str]:
    """Of the files that there are of jobs."""
    return sorted(path.suffix for path in (rig.root / "jobs").rglob("*.*"))


def files_of(rig) -> JobFiles:
    return JobFiles(open_storage(str(rig.root)))


def stored(rig, key=KEY) -> Job:
    """A job as a gateway stores it before it does anything else with it."""
    now_ms = int(time.time() * 1000)
    job = Job(
        id=new_id("adder", uuid.uuid4().hex), model="adder", nbytes=len(BODY),
        created_ms=now_ms, deadline_ms=now_ms + 3600_000,
        key=key_name("adder", None, "", key), fingerprint=fingerprint_of(BODY, None, ""),
    )  # fmt: skip
    files_of(rig).create(job, BODY)
    return job


async def test_a_repeat_while_the_job_waits_is_the_same_job(accepting):
    """One file, one turn; and not a job more in the count."""
    job = await accepted(accepting)
    assert await accepted(accepting, key=f'"{KEY}"') == job
    assert kinds(accepting) == [".asked", ".key"]
    assert await accepting.worker.broker.depth(QUEUE) == 1
    assert await accepting.metric('roost_gateway_jobs_total{state="queued"}') == 1


async def test_a_repeat_after_the_end_is_told_of_the_end(rig):
    """At another gateway as well, with a deadline and a trace of its own: it runs once."""
    job = await accepted(rig)
    result = (await rig.http.get((await ended(rig, job))["result"])).content
    again = {
        "roost-deadline-ms": "1",  # even: there is an answer already
        "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
    }
    async with another_gateway(rig) as http:
        answer = await submit(rig, http=http, **again)
        assert (answer.status_code, answer.json()["id"]) == (202, job)
        assert answer.json()["state"] == "succeeded"
        assert (await http.get(answer.json()["result"])).content == result
    assert len(rig.worker.seen) == 1


async def test_a_repeat_after_a_restart_is_the_same_job(accepting):
    """What knows of the key is the storage: the first gateway is gone, and the second new."""
    rig = accepting
    job = await accepted(rig)
    rig.stop.set()
    async with another_gateway(rig) as http:
        assert await accepted(rig, http=http) == job
        assert (await ended(rig, job, http))["state"] == "succeeded"
        assert await accepted(rig, http=http) == job
    assert len(rig.worker.seen) == 1


@pytest.mark.parametrize("when", ["while it waits", "after its end"])
async def test_another_request_under_the_same_key_is_refused(tmp_path, when):
    """422, which no other try would cure; nothing is kept of it."""
    async with running(tmp_path, job_prefetch=32 if when == "after its end" else 0) as rig:
        job = await accepted(rig)
        if when == "after its end":
            await ended(rig, job)
        there = kinds(rig)
        for other in ({"body": OTHER}, {"roost-split-key": "b"}):
            answer = await submit(rig, **other)
            assert answer.status_code == 422
            assert answer.headers["roost-code"] == "idempotency_key_reused"
            assert KEY not in answer.text
        assert kinds(rig) == there
        assert await accepted(rig) == job
        error = from_code("idempotency_key_reused", "x")
        assert (type(error), error.retryable) == (IdempotencyKeyReused, False)
        assert STATUS[error.code] == 422


async def test_a_key_is_of_one_tenant_one_model_and_one_address(tmp_path):
    """The same one elsewhere is another job; without a tenant, too."""
    async with running(tmp_path, job_prefetch=0, tenant_header="x-tenant") as rig:
        rig.register("other")
        asked = [
            {}, {"x-tenant": "a"}, {"x-tenant": "b"}, {"address": "other"},
            {"address": "adder/versions/1"},
        ]  # fmt: skip
        jobs = [await accepted(rig, **each) for each in asked]
        assert len(set(jobs)) == len(asked)
        assert [await accepted(rig, **each) for each in asked] == jobs
        answer = await rig.http.get(f"/v2/jobs/{jobs[1]}", headers={"x-tenant": "b"})
        assert answer.status_code == 404


async def test_of_many_at_once_there_is_one_job_that_runs_once(rig):
    """At two gateways that both run jobs: all are told of the same one."""
    async with another_gateway(rig) as http:
        https = [rig.http, http] * 6
        jobs = await asyncio.gather(*(accepted(rig, http=one) for one in https))
        assert len(set(jobs)) == 1
        assert (await ended(rig, jobs[0]))["state"] == "succeeded"
        await settled(rig, rig.http, http)
        assert len(rig.worker.seen) == 1


async def test_when_its_job_is_removed_a_key_is_free(rig):
    """What was removed is asked anew, and may be another request."""
    first = await accepted(rig)
    await ended(rig, first)
    assert (await rig.http.delete(f"/v2/jobs/{first}")).status_code == 204
    assert kinds(rig) == []
    second = await accepted(rig, OTHER)
    assert second != first
    assert (await ended(rig, second))["state"] == "succeeded"
    assert len(rig.worker.seen) == 2


async def test_when_its_result_is_not_kept_any_more_a_key_is_free(tmp_path):
    """Before a sweep comes by; and the sweep leaves nothing."""
    async with running(tmp_path, job_keep_s=0.0) as rig:
        first = await accepted(rig)

        async def gone() -> bool:
            return (await rig.http.get(f"/v2/jobs/{first}")).status_code == 404

        await until(gone)
        assert await accepted(rig) != first
        await settled(rig)
        config = GatewayConfig(job_keep_s=-1.0)
        await JobSweep(config, rig.worker.broker, files_of(rig)).look(shard_of("adder"))
        assert kinds(rig) == []
        assert len(rig.worker.seen) == 2


async def test_a_cancelled_job_is_what_its_key_leads_to(accepting):
    """Sending again does not undo a cancellation; removing does."""
    job = await accepted(accepting)
    assert (await accepting.http.delete(f"/v2/jobs/{job}")).status_code == 204
    answer = await submit(accepting)
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
    assert (await accepting.http.delete(f"/v2/jobs/{job}")).status_code == 204
    again = await accepted(accepting)
    assert again != job
    async with another_gateway(accepting) as http:
        assert (await ended(accepting, again, http))["state"] == "succeeded"
        await settled(accepting, http)
    assert len(accepting.worker.seen) == 1


async def test_a_repeat_after_the_deadline_is_told_that_it_expired(accepting):
    """As whoever asks by the job's id; it does not begin anew."""
    body = msgspec.json.encode({**JSON_BODY, "parameters": {"timeout": 50_000}})
    job = await accepted(accepting, body)
    assert (await ended(accepting, job))["state"] == "expired"
    answer = await submit(accepting, body)
    assert (answer.status_code, answer.json()["id"]) == (202, job)
    assert answer.json()["state"] == "expired"


async def test_what_a_death_left_of_a_key_is_swept(accepting):
    """A lock that nobody holds any more, and a key without its job; a key with one stays."""
    job = await accepted(accepting)
    files, storage = files_of(accepting), open_storage(str(accepting.root))
    gone = new_id("adder", uuid.uuid4().hex)
    files.claim(key_name("adder", None, "", "old"), Claim(gone, ""))
    storage.create(f"jobs/{gone[0]}/{gone}.freeing", b"")
    sweep = JobSweep(GatewayConfig(), accepting.worker.broker, files)
    await sweep.look(gone[0])
    assert kinds(accepting) == [".asked", ".freeing", ".key", ".key"]
    then = time.time() - 30 * 86400
    for path in [*accepting.root.rglob("*.key"), *accepting.root.rglob("*.freeing")]:
        os.utime(path, (then, then))
    await sweep.look(gone[0])
    assert kinds(accepting) == [".asked", ".key"]
    assert await accepted(accepting) == job


async def test_a_gateway_that_died_before_the_job_was_queued_is_no_obstacle(accepting):
    """A repeat has its turn at once; what the dead one left behind has none when it is found."""
    rig = accepting
    left = stored(rig)
    job = await accepted(rig)
    assert job != left.id
    async with another_gateway(rig) as http:
        assert (await ended(rig, job, http))["state"] == "succeeded"
        then = time.time() - 3600
        for path in (rig.root / "jobs").rglob("*.asked"):
            os.utime(path, (then, then))
        await JobSweep(GatewayConfig(), rig.worker.broker, files_of(rig)).look(left.id[0])
        told = await ended(rig, left.id, http)
    assert (told["state"], told["code"]) == ("cancelled", "conflict")
    assert job in told["error"]
    assert len(rig.worker.seen) == 1


async def test_a_gateway_that_died_once_the_job_was_queued_has_accepted_it(accepting):
    """Its turn took the key: a repeat is told of that job, and nothing runs twice."""
    rig = accepting
    left = stored(rig)
    await rig.worker.broker.publish("", QUEUE, Message(body=encode_note(Note(left.id))))
    async with another_gateway(rig) as http:
        assert (await ended(rig, left.id, http))["state"] == "succeeded"
        assert await accepted(rig, http=http) == left.id
    assert len(rig.worker.seen) == 1


class Doubtful(MemoryBroker):
    """Loses the confirms of a job's first two notes, which are queued all the same."""

    lost = 0

    async def publish(self, exchange, routing_key, message, **options):
        await super().publish(exchange, routing_key, message, **options)
        if routing_key == QUEUE and self.lost < 2:
            self.lost += 1
            raise PublishUncertain("no confirm")


async def test_a_doubtful_publish_leaves_at_most_one_job_that_runs(tmp_path):
    """503, since nobody knows whether it is queued. It is: a repeat finds it or takes its place."""
    exchange = MemoryExchange()
    async with running(tmp_path, lambda name: Doubtful(exchange, name)) as rig:
        assert (await submit(rig)).status_code == 503
        job = await accepted(rig)
        assert (await ended(rig, job))["state"] == "succeeded"
        await settled(rig)
        assert await accepted(rig) == job
        assert len(rig.worker.seen) == 1


async def test_what_is_refused_for_want_of_room_leaves_nothing(accepting):
    """429, and the key is as free as before."""
    rig = accepting
    await accepted(rig, key="another")
    there = kinds(rig)
    rig.exchange.max_length[QUEUE] = 1
    assert (await submit(rig)).status_code == 429
    assert kinds(rig) == there
    rig.exchange.max_length[QUEUE] = 2
    await accepted(rig, OTHER)


async def test_without_a_key_each_is_a_job_of_its_own(accepting):
    """As ever."""
    answers = [await accepting.http.post("/v2/models/adder/jobs", content=BODY) for _ in range(2)]
    assert len({answer.json()["id"] for answer in answers}) == 2
    assert kinds(accepting) == [".asked", ".asked"]


async def test_a_key_that_is_none_is_refused(accepting):
    """Empty, too long, with spaces, or two of them."""
    for key in ("", '""', "a b", "a" * 256, '"a', '"a";p', "ü".encode()):
        answer = await submit(accepting, key=key)
        assert (answer.status_code, answer.headers["roost-code"]) == (400, "invalid_argument")
    answer = await accepting.http.post(
        "/v2/models/adder/jobs",
        content=BODY,
        headers=[("Idempotency-Key", "a"), ("idempotency-key", "b")],
    )
    assert answer.status_code == 400
    assert not (accepting.root / "jobs").exists()


async def test_keys_are_kept_nowhere(rig, capfd):
    """Not in files, not in the log, not in metrics: who knows one can ask for its job."""
    key = "s3cret-" + uuid.uuid4().hex
    job = await accepted(rig, key=key)
    await ended(rig, job)
    assert (await submit(rig, OTHER, key=key)).status_code == 422
    assert (await submit(rig, key=key + "\x7f")).status_code == 400
    assert await accepted(rig, key=key) == job
    assert key not in (await rig.http.get("/metrics")).text
    said = capfd.readouterr()
    assert key not in said.out + said.err
    for path in (rig.root / "jobs").rglob("*.*"):
        assert key.encode() not in path.read_bytes()
        assert key not in path.name


@contextlib.asynccontextmanager
async def dropped(rig) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway that is broken off at the end, whatever it is about to do."""
    listening = asyncio.get_running_loop().create_future()
    service = asyncio.create_task(
        run(
            GatewayConfig(repository_url=str(rig.root), port=0, grpc_port=-1),
            asyncio.Event(),
            broker=MemoryBroker(rig.exchange, "dropped"),
            store=MemoryStore(rig.state),
            on_ready=listening.set_result,
        )
    )
    async with asyncio.timeout(30):
        url = f"http://127.0.0.1:{await listening}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:
            yield http
    finally:
        service.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await service


def numbered(number: int) -> bytes:
    tensor = {**JSON_BODY["inputs"][0], "data": [float(number), 0.0, 0.0]}
    return msgspec.json.encode({"inputs": [tensor]})


async def test_a_key_has_one_job_however_gateways_die(rig):
    """Clients send each request several times, at two gateways of which one is broken off after
    some answers, again and again; then once more. Whatever any of them was told is the same job,
    and its answer is right."""
    told = collections.defaultdict(set)

    async def send(number: int, http: httpx.AsyncClient) -> None:
        with contextlib.suppress(httpx.TransportError, RuntimeError):  # a client closed meanwhile
            answer = await submit(rig, numbered(number), key=f"key-{number}", http=http)
            if answer.status_code == 202:
                told[number].add(answer.json()["id"])
                some.release()

    for start in range(0, 40, 8):
        some = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as group, dropped(rig) as http:
            for number in range(start, start + 8):
                for one in (http, rig.http, http):
                    group.create_task(send(number, one))
            for _ in range(8):
                await some.acquire()
    for number in range(40):
        job = await accepted(rig, numbered(number), key=f"key-{number}")
        assert (await ended(rig, job))["state"] == "succeeded"
        assert told[number] <= {job}
        result = (await rig.http.get(f"/v2/jobs/{job}/result")).json()
        assert result["outputs"][0]["data"][0] == number + 1
