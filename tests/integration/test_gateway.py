"""The gateway on a real port: over the twin in memory, and its core over the real broker."""

from __future__ import annotations

import asyncio
import time

import msgspec
import numpy as np
import pytest
import structlog

from shared import names
from shared.broker.port import Message
from shared.control import ModelReport, Report
from shared.errors import AlreadyExists, DeadlineExceeded, InvalidRequest, ModelNotFound
from shared.models import Footprint, ModelSpec
from shared.store.memory import MemoryStore
from tests.archives import torchscript
from tests.gateway_rig import (
    JSON_BODY,
    SPEC,
    error_reply,
    reply_to,
    running,
    serve_rightly,
    until,
)


@pytest.fixture
async def rig(both_brokers, tmp_path):
    async with running(tmp_path, both_brokers) as made:
        yield made


@pytest.fixture
async def memory_rig(tmp_path):
    async with running(tmp_path) as made:
        yield made


async def hold(worker, delivery):
    """A script: takes the request and never answers."""
    await delivery.ack()


# --- over both brokers ---------------------------------------------------------------------


async def test_a_request_is_answered(rig):
    """The worker gets the very bytes and headers, the client the worker's reply."""
    body = msgspec.json.encode(JSON_BODY)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = await rig.infer(body, headers={"traceparent": trace})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers[names.HEADER_QUEUE_US] == "5"
    assert answer.json()["outputs"][0]["data"] == [2.0, 3.0, 4.0]
    assert answer.json()["id"] == "r1"
    (seen,) = rig.worker.seen
    assert seen.message.body == body
    assert seen.message.headers["traceparent"] == trace
    assert names.reply_to_allowed(seen.message.reply_to)
    deadline_ms = seen.message.headers[names.HEADER_DEADLINE]
    assert 25_000 < deadline_ms - time.time() * 1000 <= 30_000
    line = 'roost_gateway_requests_total{code="ok",model="adder",version="1"}'
    assert await rig.metric(line) == 1


async def test_many_at_once_each_get_their_own_answer(rig):
    """Replies find their requests by correlation id, whatever their order."""
    held = []

    async def in_reverse(worker, delivery):
        held.append(delivery)
        if len(held) == 20:
            for each in reversed(held):
                await serve_rightly(worker, each)

    rig.worker.script = in_reverse

    async def ask(number):
        body = {"inputs": [JSON_BODY["inputs"][0] | {"data": [number] * 3}], "id": str(number)}
        answer = (await rig.infer(body)).json()
        assert answer["id"] == str(number)
        assert answer["outputs"][0]["data"] == [number + 1.0] * 3

    await asyncio.gather(*map(ask, range(20)))


async def test_a_late_and_a_double_reply_are_counted_and_dropped(rig):
    """A second reply is double; one after the deadline is late. Neither harms anybody."""

    async def twice(worker, delivery):
        await worker.reply(delivery, reply_to(delivery))
        await serve_rightly(worker, delivery)

    rig.worker.script = twice
    assert (await rig.infer()).status_code == 200

    async def counted(kind):
        return await rig.metric(f'roost_gateway_stray_replies_total{{kind="{kind}"}}') == 1

    await until(lambda: counted("double"))
    rig.worker.script = hold
    answer = await rig.infer(JSON_BODY | {"parameters": {"timeout": 100_000}})
    assert answer.status_code == 504
    assert "deadline" in answer.json()["error"]
    await serve_rightly(rig.worker, rig.worker.seen[-1])
    await until(lambda: counted("late"))
    rig.worker.script = serve_rightly
    assert (await rig.infer()).status_code == 200


async def test_a_reply_queue_that_was_deleted_is_declared_again(rig):
    """The broker lost the queue: a moment later requests are answered again."""
    await rig.infer()
    queue = rig.worker.seen[0].message.reply_to
    assert await rig.worker.broker.delete_queue(queue, if_unused=False)

    async def answered():
        return (await rig.infer(headers={})).status_code == 200

    await until(answered)


# --- over the twin -------------------------------------------------------------------------


async def test_a_client_that_hangs_up_frees_its_place(memory_rig):
    """The entry goes at once, so the reply is late; the neighbours get theirs."""
    rig = memory_rig
    rig.worker.script = hold
    leaver = asyncio.create_task(rig.infer(JSON_BODY | {"id": "leaver"}))
    stayer = asyncio.create_task(rig.infer(JSON_BODY | {"id": "stayer"}))
    await until(lambda: len(rig.worker.seen) == 2)
    leaver.cancel()

    async def noticed():
        line = 'roost_gateway_requests_total{code="client_closed",model="adder",version="1"}'
        return await rig.metric(line) == 1

    await until(noticed)
    assert await rig.metric("roost_gateway_in_flight_requests") == 1
    for delivery in rig.worker.seen:
        await rig.worker.reply(delivery, reply_to(delivery))
    assert (await stayer).json()["id"] == "stayer"
    assert await rig.metric('roost_gateway_stray_replies_total{kind="late"}') == 1


async def test_errors_of_the_worker_are_passed_on(memory_rig):
    """Code, status, message and whether to try again."""
    rig = memory_rig

    async def refuse(worker, delivery):
        await worker.reply(
            delivery, error_reply(delivery, "resource_exhausted", "no room", retryable=True)
        )
        await delivery.ack()

    rig.worker.script = refuse
    answer = await rig.infer()
    assert answer.status_code == 429
    assert answer.json() == {"error": "no room"}
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers[names.HEADER_CODE] == "resource_exhausted"


async def test_a_malformed_reply_is_an_internal_error(memory_rig):
    """Whatever comes back, the client gets {"error": …}."""
    rig = memory_rig

    async def babble(worker, delivery):
        message = reply_to(delivery)
        await worker.reply(delivery, msgspec.structs.replace(message, headers={}))
        await delivery.ack()

    rig.worker.script = babble
    answer = await rig.infer()
    assert answer.status_code == 500
    assert "malformed" in answer.json()["error"]


async def test_a_full_model_answers_429_and_others_go_on(tmp_path):
    """Beyond the bound of one model: 429 with Retry-After. Another model is not concerned."""
    async with running(tmp_path, model_inflight_limit=2) as rig:
        await rig.worker.bind(rig.register("other"))
        rig.worker.script = hold
        waiting = [asyncio.create_task(rig.infer()) for _ in range(2)]
        await until(lambda: len(rig.worker.seen) == 2)
        answer = await rig.infer()
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert "in flight" in answer.json()["error"]
        assert await rig.metric('roost_gateway_rejected_total{reason="model_full"}') == 1
        rig.worker.script = serve_rightly
        assert (await rig.infer(name="other")).status_code == 200
        for delivery in rig.worker.seen[:2]:
            await rig.worker.reply(delivery, reply_to(delivery))
        assert [(await task).status_code for task in waiting] == [200, 200]


async def test_a_tenant_that_has_its_fill_answers_429_and_others_go_on(tmp_path):
    """Tenants are told apart by the configured header."""
    settings = {"tenant_header": "X-Tenant", "tenant_inflight_limit": 1}
    async with running(tmp_path, **settings) as rig:
        rig.worker.script = hold
        one = {"headers": {"x-tenant": "one"}}
        waiting = asyncio.create_task(rig.infer(**one))
        await until(lambda: rig.worker.seen)
        rig.worker.script = serve_rightly
        answer = await rig.infer(**one)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert "tenant" in answer.json()["error"]
        assert await rig.metric('roost_gateway_rejected_total{reason="tenant_full"}') == 1
        assert (await rig.infer(headers={"x-tenant": "two"})).status_code == 200
        assert (await rig.infer()).status_code == 200
        assert (await rig.infer(headers={"x-tenant": "t" * 129})).status_code == 400
        await rig.worker.reply(rig.worker.seen[0], reply_to(rig.worker.seen[0]))
        assert (await waiting).status_code == 200
        assert (await rig.infer(**one)).status_code == 200


async def test_a_full_queue_answers_429(memory_rig):
    """The broker's own limit rejects the publish."""
    rig = memory_rig
    rig.exchange.max_length["roost.model.adder.1"] = 0
    answer = await rig.infer()
    assert answer.status_code == 429
    assert "retry-after" in answer.headers


async def test_bytes_in_flight_are_bounded(tmp_path):
    """Bodies beyond the limit of all together are turned away, and the room comes back."""
    async with running(tmp_path, inflight_bytes_limit=150) as rig:
        rig.worker.script = hold
        first = asyncio.create_task(rig.infer())
        await until(lambda: rig.worker.seen)
        answer = await rig.infer()
        assert answer.status_code == 429
        assert "bytes" in answer.json()["error"]
        await rig.worker.reply(rig.worker.seen[0], reply_to(rig.worker.seen[0]))
        assert (await first).status_code == 200
        assert await rig.metric("roost_gateway_held_bytes") == 0


async def test_readiness_is_the_brokers_and_requests_say_so(memory_rig):
    """Without the broker: not ready, alive, 503 for requests; with it again, all is well."""
    rig = memory_rig
    rig.gateway_broker.lose()
    ready = await rig.http.get("/v2/health/ready")
    assert ready.status_code == 503
    assert "broker" in ready.json()["error"]
    assert (await rig.http.get("/v2/health/live")).status_code == 200
    assert (await rig.infer()).status_code == 503
    rig.gateway_broker.restore()
    assert (await rig.http.get("/v2/health/ready")).json() == {"ready": True}
    assert (await rig.infer()).status_code == 200


async def test_a_store_that_is_away_does_not_matter(memory_rig):
    """Requests, index and registration go on; only where models are is not told."""
    rig = memory_rig
    rig.state.reachable = False
    assert (await rig.infer()).status_code == 200
    (item,) = (await rig.http.get("/v2/repository/index")).json()
    assert item["state"] == "READY"
    assert (await rig.http.get("/v2/models/adder/ready")).status_code == 200


async def test_where_models_are_is_told(memory_rig):
    """Index, detail and readiness follow the workers' reports."""
    rig = memory_rig
    broken = rig.register("broken")

    def seen(model, tier, phase, error=None):
        footprint = Footprint(7, 3)
        return ModelReport(
            model=model, tier=tier, phase=phase, bound=True, footprint=footprint, error=error
        )

    report = Report(
        worker="w0", incarnation="i", seq=1, at=0.0, device_kind="cpu", device_name="cpu",
        budget_bytes=100, used_bytes=10, measured_bytes=10, generation=1,
        models=(
            seen(names.ModelId("adder/1"), "device", "ready"),
            seen(broken, "disk", "failed", "no such operator"),
        ),
    )  # fmt: skip
    await MemoryStore(rig.state).put_report(report, 60)
    index = (await rig.http.get("/v2/repository/index")).json()
    assert [(item["name"], item["state"], item["reason"]) for item in index] == [
        ("adder", "READY", "on device of 1 worker"),
        ("broken", "UNAVAILABLE", "cannot be loaded: no such operator"),
    ]
    ready = (await rig.http.post("/v2/repository/index", json={"ready": True})).json()
    assert [item["name"] for item in ready] == ["adder"]
    detail = (await rig.http.get("/v2/repository/models/adder")).json()["versions"][0]
    assert detail["device"] == detail["bound"] == ["w0"]
    assert detail["device_bytes"] == 10
    assert detail["manifest"]["digest"].startswith("sha256:")
    answer = await rig.http.get("/v2/models/broken/ready")
    assert answer.status_code == 503
    assert "no such operator" in answer.json()["error"]


async def test_the_earliest_deadline_counts(memory_rig):
    """Body and header may both name one; a passed one is 504 without bothering anybody."""
    rig = memory_rig
    soon = str(int((time.time() + 5) * 1000))
    body = JSON_BODY | {"parameters": {"timeout": 60_000_000}}
    assert (await rig.infer(body, headers={names.HEADER_DEADLINE: soon})).status_code == 200
    assert rig.worker.seen[-1].message.headers[names.HEADER_DEADLINE] <= int(soon) + 1
    assert rig.worker.seen[-1].message.expiration_ms <= 5000
    answer = await rig.infer(headers={names.HEADER_DEADLINE: "1000"})
    assert answer.status_code == 504
    assert len(rig.worker.seen) == 1


async def test_a_raw_binary_request_gets_a_header(memory_rig):
    """Header length 0: the body is the one input; the worker sees an ordinary request."""
    raw = np.array([1, 2, 3], np.float32).tobytes()
    answer = await memory_rig.infer(raw, headers={names.HEADER_LENGTH: "0"})
    assert answer.status_code == 200
    length = int(answer.headers[names.HEADER_LENGTH])
    assert np.frombuffer(answer.content[length:], np.float32).tolist() == [2, 3, 4]


async def test_stopping_answers_what_is_under_way(tmp_path):
    """After `stop`, a request that waits is answered, in the end with 503."""
    async with running(tmp_path, stop_grace_s=0.2) as rig:
        rig.worker.script = hold
        waiting = asyncio.create_task(rig.infer())
        await until(lambda: rig.worker.seen)
        rig.stop.set()
        answer = await waiting
        assert answer.status_code == 503
        assert answer.json() == {"error": "the gateway is stopping"}


async def test_what_is_logged_of_a_request_names_it(memory_rig):
    """Model and request id, the client's own where there is one, stand in every line; and in
    none after the answer."""
    rig = memory_rig

    async def garbled(worker, delivery):
        message = Message(body=b"?", correlation_id=delivery.message.correlation_id)
        await worker.reply(delivery, message)
        await delivery.ack()

    rig.worker.script = garbled
    unnamed = {"inputs": JSON_BODY["inputs"]}
    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[merge]) as lines:
        assert (await rig.infer()).status_code == 500
        assert (await rig.infer(unnamed)).status_code == 500
    told = [(line["event"], line["model"], line["request_id"]) for line in lines]
    correlation_id = rig.worker.seen[1].message.correlation_id
    assert told == [
        (event, "adder", request_id)
        for request_id in ("r1", correlation_id)
        for event in ("malformed_reply", "request_failed")
    ]


async def test_two_gateways_of_one_instance_name_share_no_answers(tmp_path):
    """A reply to an earlier start of the same instance is unknown, not somebody else's."""
    async with running(tmp_path, instance="pod-0") as rig:
        rig.worker.script = hold
        waiting = asyncio.create_task(rig.infer())
        await until(lambda: rig.worker.seen)
        old = rig.worker.seen[0]
        assert old.message.reply_to == "roost.reply.pod-0"
        stale = msgspec.structs.replace(reply_to(old), correlation_id="0123456789ab.1")
        await rig.worker.reply(old, stale)
        await rig.worker.reply(old, reply_to(old))
        assert (await waiting).json()["id"] == "r1"
        assert await rig.metric('roost_gateway_stray_replies_total{kind="unknown"}') == 1


# --- the Python client ---------------------------------------------------------------------


async def test_the_client_pushes_lists_asks_and_removes(memory_rig, tmp_path):
    """The whole life of a model through `RoostClient`."""
    from roost.client import RoostClient

    rig = memory_rig
    file = tmp_path / "model.pt"
    file.write_bytes(torchscript(bytes(3_000_000)))
    told = []

    def live():
        with RoostClient(rig.url) as roost:
            assert roost.ready()
            first = roost.push("new", file, spec=SPEC, progress=lambda *at: told.append(at))
            assert first.id == "new/1"
            assert roost.push("new", file, spec=SPEC).id == "new/1"  # the same again
            assert roost.push("new", file, spec=ModelSpec()).id == "new/2"
            with pytest.raises(AlreadyExists):
                roost.push("new", file, version=1)
            assert [(m["name"], m["version"]) for m in roost.list()] == [
                ("adder", "1"),
                ("new", "1"),
                ("new", "2"),
            ]
            x = np.ones((2, 3), np.float32)
            y = roost.infer("adder", {"x": x}, timeout_s=5)["y"]
            assert y.tolist() == [[2, 2, 2], [2, 2, 2]]
            assert roost.metadata("new", 1)["inputs"][0]["shape"] == [-1, 3]
            roost.unload("new")
            with pytest.raises(ModelNotFound, match="unloaded"):
                roost.metadata("new")
            roost.load("new")
            roost.remove("new", 2)
            roost.remove("new")
            with pytest.raises(ModelNotFound):
                roost.metadata("new")
            with pytest.raises(InvalidRequest, match="'x' is missing"):
                roost.infer("adder", {"z": x})

    await asyncio.to_thread(live)
    assert told[-1] == (file.stat().st_size, file.stat().st_size)
    assert [size for size, _ in told] == sorted(size for size, _ in told)


async def test_the_async_client_does_the_same(memory_rig, tmp_path):
    """Push, ask with a deadline, remove."""
    from roost.client import AsyncRoostClient

    file = tmp_path / "model.pt"
    file.write_bytes(torchscript(bytes(1000)))
    async with AsyncRoostClient(memory_rig.url) as roost:
        assert await roost.ready()
        assert (await roost.push("new", file, spec=SPEC)).id == "new/1"
        outputs = await roost.infer("adder", {"x": np.zeros((1, 3), np.float32)}, outputs=["y"])
        assert outputs["y"].tolist() == [[1, 1, 1]]
        memory_rig.worker.script = hold
        with pytest.raises(DeadlineExceeded):
            await roost.infer("adder", {"x": np.zeros((1, 3), np.float32)}, timeout_s=0.1)
        await roost.unload("new")
        with pytest.raises(ModelNotFound, match="unloaded"):
            await roost.metadata("new")
        await roost.load("new")
        await roost.remove("new")
        assert [item["name"] for item in await roost.list()] == ["adder"]


# --- an unmodified client of Triton's ------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_tritonclient_works_unmodified(memory_rig):
    """Health, metadata, config, readiness, index and binary inference of tritonclient.http."""
    triton = pytest.importorskip("tritonclient.http")
    rig = memory_rig

    def use():
        with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("adder")
            assert client.is_model_ready("adder", "1")
            assert not client.is_model_ready("absent")
            server = client.get_server_metadata()
            assert server["name"] == "roost"
            assert "schedule_policy" in server["extensions"]
            metadata = client.get_model_metadata("adder")
            assert metadata["versions"] == ["1"]
            assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
            config = client.get_model_config("adder")
            assert config["max_batch_size"] == 8
            assert config["input"][0]["data_type"] == "TYPE_FP32"
            assert client.get_model_repository_index() == [
                {"name": "adder", "version": "1", "state": "READY", "reason": "disk",
                 "size_bytes": config_size(rig), "own_bytes": config_size(rig),
                 "shared_bytes": 0, "tiers": {}}
            ]  # fmt: skip
            x = np.array([[1, 2, 3]], np.float32)
            for binary in (True, False):
                given = triton.InferInput("x", [1, 3], "FP32")
                given.set_data_from_numpy(x, binary_data=binary)
                result = client.infer(
                    "adder",
                    [given],
                    request_id="7",
                    timeout=5_000_000,
                    priority=1,
                    outputs=[triton.InferRequestedOutput("y", binary_data=binary)],
                )
                assert result.as_numpy("y").tolist() == [[2, 3, 4]]
                assert result.get_response()["id"] == "7"
            for algorithm in ("gzip", "deflate"):
                given.set_data_from_numpy(x)
                result = client.infer("adder", [given], request_compression_algorithm=algorithm)
                assert result.as_numpy("y").tolist() == [[2, 3, 4]]
            with pytest.raises(Exception, match="not registered"):
                client.infer("absent", [given])

    await asyncio.to_thread(use)
    assert rig.worker.seen[0].message.priority == 9


def config_size(rig) -> int:
    return rig.repository.versions.manifest("adder").size_bytes
