"""Jobs through a gateway: submit, look, fetch, cancel, over a memory broker and over RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import msgspec
import numpy as np
import pytest

from services.gateway.config import GatewayConfig
from services.gateway.core.jobs import Note, encode_note, queue_of, shard_of
from services.gateway.jobs.files import JobFiles
from services.gateway.jobs.sweep import JobSweep
from shared import v2
from shared.broker.port import Message
from shared.cancels import CancelledRequests
from shared.names import DEAD, HEADER_LENGTH
from shared.storage import open_storage
from shared.store.memory import MemoryStore
from shared.store.port import TOPIC_CANCELLED
from shared.tensors import from_numpy
from tests.gateway_rig import (
    JSON_BODY,
    another_gateway,
    error_reply,
    reply_to,
    running,
    serve_rightly,
    until,
)

QUEUE = queue_of(shard_of("adder"))


@pytest.fixture
async def rig(both_brokers, tmp_path):
    """A gateway over the broker in memory, and over RabbitMQ."""
    async with running(tmp_path, both_brokers) as made:
        yield made


@pytest.fixture
async def memory_rig(tmp_path):
    async with running(tmp_path) as made:
        yield made


@pytest.fixture
async def accepting(tmp_path):
    """A gateway that takes jobs and runs none."""
    async with running(tmp_path, job_prefetch=0) as made:
        yield made


async def submit(rig, body=None, name="adder", http=None, **options):
    content = body if isinstance(body, bytes) else msgspec.json.encode(body or JSON_BODY)
    return await (http or rig.http).post(f"/v2/models/{name}/jobs", content=content, **options)


async def accepted(rig, body=None, **options) -> str:
    answer = await submit(rig, body, **options)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


async def ended(rig, id_, http=None, **options) -> dict:
    """The job, once it has ended."""
    told = {}

    async def over() -> bool:
        nonlocal told
        answer = await (http or rig.http).get(f"/v2/jobs/{id_}", **options)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        return told["state"] != "queued"

    await until(over, 30)
    return told


def files(rig) -> set[str]:
    folder = rig.root / "jobs"
    return {path.name for path in folder.rglob("*.*")} if folder.exists() else set()


async def silent(worker, delivery):
    """A script: no answer, ever."""


async def test_a_job_is_accepted_run_and_fetched(rig):
    """The result is, byte for byte, what `infer` answers."""
    answer = await submit(rig)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v2/jobs/{job['id']}"
    assert job["state"] == "queued"
    assert job["request_id"] == "r1"
    told = await ended(rig, job["id"])
    assert told["state"] == "succeeded"
    assert told["ended"] >= told["created"]
    result = await rig.http.get(told["result"])
    direct = await rig.infer()
    assert (result.status_code, result.content) == (200, direct.content)
    for name in ("content-type", "roost-queue-us"):
        assert result.headers[name] == direct.headers[name]
    assert files(rig) == {f"{job['id']}.ended"}
    assert await rig.metric('roost_gateway_jobs_total{state="queued"}') == 1

    async def counted() -> bool:
        return await rig.metric('roost_gateway_jobs_total{state="succeeded"}') == 1

    await until(counted)  # which is after the file has been written
    assert (await rig.http.delete(answer.headers["location"])).status_code == 204
    assert (await rig.http.get(answer.headers["location"])).status_code == 404
    assert (await rig.http.get(told["result"])).status_code == 404
    assert files(rig) == set()


async def test_binary_tensors_in_and_out(rig):
    """Raw bytes in the request and in the result."""
    array = np.asarray([[1.0, 2.0, 3.0]], dtype=np.float32)
    request = v2.InferRequest(
        inputs=(from_numpy("x", array),), parameters={"binary_data_output": True}
    )
    body, length = v2.encode_request(request)
    headers = {HEADER_LENGTH: str(length)}
    job = await accepted(rig, body, headers=headers)
    assert (await ended(rig, job))["state"] == "succeeded"
    result = await rig.http.get(f"/v2/jobs/{job}/result")
    direct = await rig.infer(body, headers=headers)
    assert int(result.headers[HEADER_LENGTH]) < len(result.content)
    assert result.content == direct.content
    assert result.headers[HEADER_LENGTH] == direct.headers[HEADER_LENGTH]


async def test_many_jobs_each_get_their_own_answer(rig):
    """More than run at once, from several clients."""
    bodies = [
        {"inputs": [{**JSON_BODY["inputs"][0], "data": [float(n), 0.0, 0.0]}]} for n in range(60)
    ]
    jobs = await asyncio.gather(*(accepted(rig, body) for body in bodies))
    for number, job in enumerate(jobs):
        assert (await ended(rig, job))["state"] == "succeeded"
        result = (await rig.http.get(f"/v2/jobs/{job}/result")).json()
        assert result["outputs"][0]["data"][0] == number + 1


async def test_before_its_end_a_job_has_no_result(memory_rig):
    """409 with a time to come back: neither a wrong address nor a failure."""
    rig = memory_rig
    rig.worker.script = silent
    job = await accepted(rig)
    await rig.worker.arrived.wait()
    answer = await rig.http.get(f"/v2/jobs/{job}/result")
    assert answer.status_code == 409
    assert answer.headers["roost-code"] == "job_not_done"
    assert int(answer.headers["retry-after"]) >= 1
    assert "error" in answer.json()


async def test_what_is_wrong_is_said_at_once(memory_rig):
    """As `infer` says it; nothing is kept of it."""
    rig = memory_rig
    assert (await submit(rig, b"{")).status_code == 400
    assert (await submit(rig, {"inputs": []})).status_code == 400
    assert (await submit(rig, name="nobody")).status_code == 404
    assert (await rig.http.get("/v2/jobs/../../etc")).status_code == 404
    assert (await rig.http.get(f"/v2/jobs/{'0' * 32}")).status_code == 404
    assert (await rig.http.delete(f"/v2/jobs/{'0' * 32}")).status_code == 404
    assert (await rig.http.post(f"/v2/jobs/{'0' * 32}")).status_code == 405
    late = {**JSON_BODY, "parameters": {"timeout": 1}}
    headers = {"roost-deadline-ms": "1"}
    assert (await submit(rig, late, headers=headers)).status_code == 504
    assert files(rig) == set()


async def test_a_failed_job_answers_as_infer_would(memory_rig):
    """Same status, same body, same code; and the job tells the error."""
    rig = memory_rig

    async def fail(worker, delivery):
        await worker.reply(delivery, error_reply(delivery, "model_failed", "division by zero"))
        await delivery.ack()

    rig.worker.script = fail
    job = await accepted(rig)
    told = await ended(rig, job)
    assert (told["state"], told["code"], told["error"]) == (
        "failed", "model_failed", "division by zero",
    )  # fmt: skip
    result = await rig.http.get(f"/v2/jobs/{job}/result")
    direct = await rig.infer()
    assert (result.status_code, result.content) == (direct.status_code, direct.content)
    assert result.headers["roost-code"] == direct.headers["roost-code"] == "model_failed"
    assert len(rig.worker.seen) == 2


async def test_passing_trouble_is_no_end(memory_rig):
    """A job waits for a worker that takes it, where a request would have been refused."""
    rig = memory_rig

    async def refuse_once(worker, delivery):
        worker.script = serve_rightly
        reply = error_reply(delivery, "unavailable", "no room on any device", retryable=True)
        await worker.reply(delivery, reply)
        await delivery.ack()

    rig.worker.script = refuse_once
    job = await accepted(rig)
    assert (await ended(rig, job))["state"] == "succeeded"
    assert len(rig.worker.seen) == 2


async def test_a_job_stands_behind_what_somebody_waits_for(memory_rig):
    """The lowest of AMQP's priorities, unless it names its own; and it carries its deadline."""
    rig = memory_rig
    await ended(rig, await accepted(rig))
    assert rig.worker.seen[-1].message.priority == 1
    await ended(rig, await accepted(rig, {**JSON_BODY, "parameters": {"priority": 2}}))
    assert rig.worker.seen[-1].message.priority == 8
    assert rig.worker.seen[-1].message.headers["roost-deadline-ms"] > time.time() * 1000


async def test_many_jobs_do_not_stand_before_a_request(tmp_path):
    """Only so many are under way, however many wait; the model's queue is free for people."""

    async def leave_jobs(worker, delivery):
        if delivery.message.priority != 1:
            await serve_rightly(worker, delivery)

    async with running(tmp_path, job_prefetch=3) as rig:
        rig.worker.script = leave_jobs
        for _ in range(10):
            await accepted(rig)
        await rig.worker.arrived.wait()

        async def busy() -> bool:
            return await rig.metric("roost_gateway_running_jobs") == 3

        await until(busy)
        assert (await rig.infer()).status_code == 200
        assert await rig.worker.broker.depth(QUEUE) == 7
        assert await rig.metric("roost_gateway_in_flight_requests") <= 3


async def test_a_job_whose_deadline_passes_expires(memory_rig):
    """The result is the error of a late request."""
    rig = memory_rig
    rig.worker.script = silent
    job = await accepted(rig, {**JSON_BODY, "parameters": {"timeout": 300_000}})
    told = await ended(rig, job)
    assert (told["state"], told["code"]) == ("expired", "deadline_exceeded")
    result = await rig.http.get(f"/v2/jobs/{job}/result")
    assert result.status_code == 504
    assert result.headers["roost-code"] == "deadline_exceeded"


async def test_a_job_that_nobody_runs_expires(accepting):
    """Also when no gateway gives it a turn: whoever asks is told, and the request goes."""
    job = await accepted(accepting, {**JSON_BODY, "parameters": {"timeout": 50_000}})
    assert (await ended(accepting, job))["state"] == "expired"
    assert files(accepting) == {f"{job}.ended"}
    assert accepting.worker.seen == []


async def test_a_cancelled_job_never_runs(accepting):
    """It can be seen to be cancelled, and the device is not troubled with it."""
    rig = accepting
    first, second = await accepted(rig), await accepted(rig)
    assert (await rig.http.delete(f"/v2/jobs/{first}")).status_code == 204
    async with another_gateway(rig) as http:
        assert (await ended(rig, second, http))["state"] == "succeeded"
        told = await ended(rig, first, http)
    assert told["state"] == "cancelled"
    assert len(rig.worker.seen) == 1
    assert (await rig.http.get(f"/v2/jobs/{first}/result")).status_code == 404
    assert (await rig.http.delete(f"/v2/jobs/{first}")).status_code == 204
    assert (await rig.http.get(f"/v2/jobs/{first}")).status_code == 404


async def test_cancelling_takes_back_what_is_under_way(accepting):
    """At whatever gateway: the worker is told, and an answer that comes anyway finds no place."""
    rig = accepting
    rig.worker.script = silent
    store = MemoryStore(rig.state)
    await store.start()
    heard = CancelledRequests()

    async def listen():
        async for data in store.notes(TOPIC_CANCELLED):
            heard.note(data, int(time.time() * 1000))

    listening = asyncio.create_task(listen())
    try:
        async with another_gateway(rig) as http:
            job = await accepted(rig)
            await rig.worker.arrived.wait()
            delivery = rig.worker.seen[0]
            assert (await rig.http.delete(f"/v2/jobs/{job}")).status_code == 204
            await until(lambda: delivery.message.correlation_id in heard)
            await rig.worker.reply(delivery, reply_to(delivery))
            assert (await http.get(f"/v2/jobs/{job}")).json()["state"] == "cancelled"
            assert (await http.get(f"/v2/jobs/{job}/result")).status_code == 404
        assert files(rig) == {f"{job}.ended"}
    finally:
        listening.cancel()
        await store.close()


async def test_tenants_do_not_see_each_others_jobs(tmp_path):
    """An id that is another's is no job; the owner has it. Jobs count against nobody while they
    wait."""
    async with running(tmp_path, tenant_header="x-tenant", tenant_inflight_limit=1) as rig:
        mine = {"x-tenant": "a"}
        jobs = [await accepted(rig, headers=mine) for _ in range(3)]
        for job in jobs:
            assert (await ended(rig, job, headers=mine))["state"] == "succeeded"
        for theirs in ({"x-tenant": "b"}, {}):
            for call in ("GET", "DELETE"):
                answer = await rig.http.request(call, f"/v2/jobs/{jobs[0]}", headers=theirs)
                assert answer.status_code == 404
            answer = await rig.http.get(f"/v2/jobs/{jobs[0]}/result", headers=theirs)
            assert answer.status_code == 404
        assert (await rig.http.get(f"/v2/jobs/{jobs[0]}/result", headers=mine)).status_code == 200


async def test_without_a_broker_no_job_is_accepted(memory_rig):
    """503, and nothing is left of it."""
    memory_rig.gateway_broker.lose()
    answer = await submit(memory_rig)
    assert answer.status_code == 503
    assert files(memory_rig) == set()


async def test_a_full_job_queue_answers_429(accepting):
    """The queue's own limit bounds how many jobs wait; nothing is left of the refused."""
    job = await accepted(accepting)
    accepting.exchange.max_length[QUEUE] = 1
    answer = await submit(accepting)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert files(accepting) == {f"{job}.asked"}


async def test_what_is_no_job_blocks_nobody(rig):
    """Rubbish in the queue becomes a dead letter; a note of no job is dropped."""
    broker = rig.worker.broker
    before = await broker.depth(DEAD)
    await broker.publish("", QUEUE, Message(body=b"rubbish"))
    unknown = shard_of("adder") + "f" * 31
    await broker.publish("", QUEUE, Message(body=encode_note(Note(unknown))))
    assert (await ended(rig, await accepted(rig)))["state"] == "succeeded"

    async def buried() -> bool:
        return await broker.depth(DEAD) == before + 1

    await until(buried)


async def test_a_job_that_is_queued_twice_runs_once(memory_rig):
    """While it runs, and after it has ended."""
    rig = memory_rig
    rig.worker.script = silent
    job = await accepted(rig)
    await rig.worker.arrived.wait()
    again = Message(body=encode_note(Note(job)))
    await rig.worker.broker.publish("", QUEUE, again)
    delivery = rig.worker.seen[0]
    await rig.worker.reply(delivery, reply_to(delivery))
    await ended(rig, job)
    await rig.worker.broker.publish("", QUEUE, again)
    rig.worker.script = serve_rightly
    await ended(rig, await accepted(rig))
    assert len(rig.worker.seen) == 2


async def test_a_gateway_that_stops_leaves_its_jobs_to_others(tmp_path):
    """What it was running, another one runs."""
    async with running(tmp_path) as rig:
        rig.worker.script = silent
        job = await accepted(rig)
        await rig.worker.arrived.wait()
        rig.stop.set()
        rig.worker.script = serve_rightly
        async with another_gateway(rig) as http:
            assert (await ended(rig, job, http))["state"] == "succeeded"


async def test_a_job_that_the_broker_lost_comes_back(accepting):
    """Its file is the job; the queue only says whose turn it is."""
    rig = accepting
    job = await accepted(rig)
    rig.exchange.delete(QUEUE)
    sweep = JobSweep(GatewayConfig(), rig.worker.broker, JobFiles(open_storage(str(rig.root))))
    async with another_gateway(rig) as http:
        await sweep.look(shard_of("adder"))
        assert rig.worker.seen == []  # it may still have its turn: not yet
        age(rig, job, 3600)
        await sweep.look(shard_of("adder"))
        assert (await ended(rig, job, http))["state"] == "succeeded"


async def test_results_go_when_their_time_is_over(memory_rig):
    """Asked for or not; what waits stays."""
    rig = memory_rig
    job = await accepted(rig)
    await ended(rig, job)
    sweep = JobSweep(
        GatewayConfig(job_keep_s=60), rig.worker.broker, JobFiles(open_storage(str(rig.root)))
    )
    await sweep.look(job[0])
    assert files(rig) == {f"{job}.ended"}
    age(rig, job, 61)
    await sweep.look(job[0])
    assert files(rig) == set()


async def test_a_result_past_its_time_is_not_told(tmp_path):
    """Even before a sweep comes by."""
    async with running(tmp_path, job_keep_s=0.0) as rig:
        job = await accepted(rig)

        async def gone() -> bool:
            return (await rig.http.get(f"/v2/jobs/{job}")).status_code == 404

        await until(gone)


async def test_a_broken_result_is_a_fault_of_that_job_alone(memory_rig):
    """500 to who asks for it; the others go on."""
    rig = memory_rig
    job = await accepted(rig)
    await ended(rig, job)
    (path,) = (rig.root / "jobs").rglob("*.ended")
    path.write_bytes(b"\xff\xff")
    assert (await rig.http.get(f"/v2/jobs/{job}")).status_code == 500
    assert (await ended(rig, await accepted(rig)))["state"] == "succeeded"


async def test_a_broken_request_is_put_away_at_its_turn(accepting):
    """It can never run: it must not come back for ever, nor hold up the others."""
    rig = accepting
    job = await accepted(rig)
    (path,) = (rig.root / "jobs").rglob("*.asked")
    path.write_bytes(b"\xff\xff")
    good = await accepted(rig)
    async with another_gateway(rig) as http:
        assert (await ended(rig, good, http))["state"] == "succeeded"

        async def gone() -> bool:
            return (await http.get(f"/v2/jobs/{job}")).status_code == 404

        await until(gone)
    assert await rig.worker.broker.depth(QUEUE) == 0


def age(rig, job: str, seconds: float) -> None:
    """Makes the files of a job look older."""
    then = time.time() - seconds
    with contextlib.suppress(FileNotFoundError):
        for path in (rig.root / "jobs").rglob(f"{job}.*"):
            os.utime(path, (then, then))
