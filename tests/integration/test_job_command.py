"""`roost job` and the clients' jobs, against a gateway: over a memory broker and over RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import uuid

import numpy as np
import pytest

from roost.__main__ import main
from roost.client import AsyncRoostClient, RoostClient
from shared.errors import (
    DeadlineExceeded,
    IdempotencyKeyReused,
    InvalidRequest,
    JobNotDone,
    ModelFailed,
    ModelNotFound,
)
from tests.gateway_rig import JSON_BODY, error_reply, running
from tests.serving import served

X = {"x": np.asarray([[1, 2, 3]], np.float32)}
INPUT = "x=[[1, 2, 3]]"


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


async def fail(worker, delivery):
    """A script: the model raises."""
    await worker.reply(delivery, error_reply(delivery, "model_failed", "it does not add up"))
    await delivery.ack()


class Roost:
    """The command, asked in this process: the gateway beside it logs to the same place."""

    def __init__(self, capsys) -> None:
        self._capsys = capsys
        self.said = ""
        self.complained = ""

    async def __call__(self, rig, *arguments: str) -> int:
        self._capsys.readouterr()
        status = await asyncio.to_thread(main, [*arguments, "--url", rig.url])
        told = self._capsys.readouterr()
        lines = told.out.splitlines(keepends=True)
        self.said = "".join(line for line in lines if not re.match(r"\d{4}-\d\d-\d\d ", line))
        self.complained = told.err
        return status


@pytest.fixture
def roost(capsys):
    return Roost(capsys)


# --- the clients -----------------------------------------------------------------------------


async def test_a_job_by_the_client_for_asyncio(rig):
    """Submit, look, wait for the result, remove."""
    async with AsyncRoostClient(rig.url) as client:
        told = await client.submit("adder", X, timeout_s=60)
        assert (told["state"], told["model_name"]) == ("queued", "adder")
        outputs = await client.result(told["id"], wait_s=60)
        assert outputs["y"].tolist() == [[2, 3, 4]]
        assert (await client.job(told["id"]))["state"] == "succeeded"
        await client.cancel(told["id"])
        with pytest.raises(ModelNotFound, match="no such job"):
            await client.result(told["id"], wait_s=None)


async def test_a_job_by_the_blocking_client(rig):
    """The same, and one that is not for ever."""

    def use():
        with RoostClient(rig.url) as client:
            id_ = client.submit("adder", X, 1, outputs=["y"])["id"]
            assert client.result(id_, wait_s=None)["y"].tolist() == [[2, 3, 4]]
            assert client.job(id_)["model_version"] == "1"
            with pytest.raises(InvalidRequest, match="'x' is missing"):
                client.submit("adder", {"z": X["x"]})
            rig.worker.script = fail
            with pytest.raises(ModelFailed, match="does not add up"):
                client.result(client.submit("adder", X)["id"], wait_s=60)

    await asyncio.to_thread(use)


async def test_a_job_that_nobody_runs(accepting):
    """It has no result until its deadline, which then is its result; one that is cancelled has
    none."""
    async with AsyncRoostClient(accepting.url) as client:
        id_ = (await client.submit("adder", X))["id"]
        for wait_s in (0, 0.01):
            with pytest.raises(JobNotDone):
                await client.result(id_, wait_s)
        await client.cancel(id_)
        with pytest.raises(ModelNotFound, match="cancelled"):
            await client.result(id_, wait_s=None)
        short = (await client.submit("adder", X, timeout_s=1))["id"]
        with pytest.raises(DeadlineExceeded):
            await client.result(short, wait_s=None)


async def test_a_key_that_is_used_again_is_the_same_job(accepting):
    """For the same request; another one is refused by a code that the client knows."""
    async with AsyncRoostClient(accepting.url) as client:
        key = str(uuid.uuid4())
        first, again, other = [
            (await client.submit("adder", X, idempotency_key=k))["id"] for k in (key, key, None)
        ]
        assert first == again
        assert first != other
        with pytest.raises(IdempotencyKeyReused):
            await client.submit("adder", {"x": X["x"] + 1}, idempotency_key=key)


class Forgetful:
    """In front of a gateway: passes requests on, and closes the connection instead of the first
    answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        passing = asyncio.create_task(self._pass(reader, back))
        try:
            while answer := await there.read(65536):
                if self.requests == 1:
                    break
                writer.write(answer)
        finally:
            writer.close()
            await passing
            back.close()
            await back.wait_closed()

    async def _pass(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                self.requests += piece.startswith(b"POST ")
                back.write(piece)
        if back.can_write_eof():
            back.write_eof()


async def test_a_job_whose_acceptance_was_lost_is_submitted_once(accepting):
    """The gateway had accepted it when the connection went; the client asks again, and is told of
    the same job."""
    between = Forgetful(accepting.port)
    async with served(between.serve) as url, AsyncRoostClient(url) as client:
        id_ = (await client.submit("adder", X))["id"]
    assert between.requests == 2
    assert await accepting.metric('roost_gateway_jobs_total{state="queued"}') == 1
    async with AsyncRoostClient(accepting.url) as client:
        assert (await client.job(id_))["state"] == "queued"


# --- the command -----------------------------------------------------------------------------


async def test_what_is_submitted_can_be_fetched_by_its_id(rig, roost):
    """The id stands alone on standard output; the result is what `roost infer` prints."""
    assert await roost(rig, "job", "submit", "adder", INPUT) == 0
    id_ = roost.said.strip()
    assert re.fullmatch("[0-9a-f]{32}", id_)
    assert await roost(rig, "job", "result", id_, "--wait", "--timeout", "60") == 0
    result = json.loads(roost.said)
    assert result["outputs"][0]["data"] == [2, 3, 4]
    assert await roost(rig, "infer", "adder", INPUT) == 0
    assert json.loads(roost.said) == result
    assert await roost(rig, "job", "show", id_) == 0
    assert f"id: {id_}" in roost.said.splitlines()
    assert "state: succeeded" in roost.said.splitlines()
    assert await roost(rig, "job", "show", id_, "--json") == 0
    assert json.loads(roost.said)["state"] == "succeeded"
    assert await roost(rig, "job", "cancel", id_) == 0
    assert roost.said == ""
    assert await roost(rig, "job", "show", id_) == 1
    assert "no such job" in roost.complained


async def test_submit_can_wait(memory_rig, roost):
    """The result is all of its output; the id is told aside, for whoever interrupts it."""
    given = ("job", "submit", "adder", INPUT, "--wait", "--version", "1", "--timeout", "60")
    assert await roost(memory_rig, *given) == 0
    assert json.loads(roost.said)["outputs"][0]["data"] == [2, 3, 4]
    assert re.fullmatch("job [0-9a-f]{32}\n", roost.complained)
    memory_rig.worker.script = fail
    assert await roost(memory_rig, *given) == 1
    assert roost.complained.splitlines()[-1] == "roost: it does not add up"


async def test_a_request_from_a_file(memory_rig, roost, tmp_path):
    """Sent as it is, raw tensors in the answer shown as numbers."""
    file = tmp_path / "request.json"
    file.write_text(json.dumps({**JSON_BODY, "parameters": {"binary_data_output": True}}))
    given = ("job", "submit", "adder", "--json", str(file))
    assert await roost(memory_rig, *given, "--wait") == 0
    told = json.loads(roost.said)
    assert (told["id"], told["outputs"][0]["data"]) == ("r1", [2, 3, 4])


async def test_jobs_that_wait(accepting, roost):
    """No result is exit status 1 and a line that says why; all that are named are cancelled."""
    ids = []
    for _ in range(2):
        assert await roost(accepting, "job", "submit", "adder", INPUT) == 0
        ids.append(roost.said.strip())
    assert await roost(accepting, "job", "result", ids[0]) == 1
    assert roost.complained == "roost: the job has not ended\n"
    assert await roost(accepting, "job", "result", ids[0], "--wait", "--timeout", "0.01") == 1
    assert await roost(accepting, "job", "cancel", *ids) == 0
    for id_ in ids:
        assert await roost(accepting, "job", "show", id_) == 0
        assert "state: cancelled" in roost.said
        assert await roost(accepting, "job", "result", id_) == 1
        assert "cancelled" in roost.complained


async def test_a_key_can_be_given(accepting, roost):
    """The same command again prints the same id."""
    given = ("job", "submit", "adder", INPUT, "--idempotency-key", "order-17")
    ids = set()
    for _ in range(2):
        assert await roost(accepting, *given) == 0
        ids.add(roost.said)
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("submit", "adder"), "--json FILE"),
        (("submit", "adder", INPUT, "--json", "x.json"), "not both"),
        (("submit", "adder", "--json", "x.json", "--timeout", "5"), "its own timeout"),
        (("submit", "adder", INPUT, "--idempotency-key", "a b"), "idempotency key"),
        (("submit", "nobody", INPUT), "nobody"),
        (("submit", "adder", "x=[["), "not JSON"),
        (("submit", "adder", "x:FP32:1,2=[[1, 2]]"), "x"),
        (("result", "1f", "--timeout", "5"), "--wait"),
        (("result", "1f"), "no such job"),
    ],
)
async def test_what_is_wrong_is_said_in_one_line(memory_rig, roost, arguments, reason):
    """Exit status 1, and nothing on standard output."""
    assert await roost(memory_rig, "job", *arguments) == 1
    assert roost.said == ""
    assert reason in roost.complained
    assert len(roost.complained.splitlines()) == 1
