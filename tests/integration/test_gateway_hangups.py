"""Clients that leave and clients that are slow: what they cost the workers and the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time

import pytest

from services.gateway.cancels import Cancels
from services.gateway.metrics import Metrics
from services.worker.app import run as run_worker
from services.worker.config import WorkerConfig
from shared.broker.memory import MemoryBroker
from shared.cancels import CancelledRequests
from shared.control import Assigned, Assignment
from shared.models import ModelSpec, TensorSpec
from shared.names import model_queue
from shared.store.memory import MemoryState, MemoryStore
from shared.store.port import TOPIC_CANCELLED, topic_assignment
from tests.gateway_rig import JSON_BODY, echo, running, until
from tests.unit.worker.fake_engine import FakeEngine


@pytest.fixture
async def rig(tmp_path):
    async with running(tmp_path) as made:
        yield made


@contextlib.asynccontextmanager
async def listening(rig):
    """What a worker hears."""
    told = CancelledRequests()
    notes = []

    async def listen():
        async for data in MemoryStore(rig.state).notes(TOPIC_CANCELLED):
            notes.append(data)
            told.note(data, int(time.time() * 1000))

    task = asyncio.create_task(listen())
    await until(lambda: rig.state.note_listeners)
    try:
        yield told, notes
    finally:
        task.cancel()


async def hold(worker, delivery):
    await delivery.ack()


async def test_workers_hear_who_hung_up(rig):
    """That request and no other, for as long as it could run."""
    rig.worker.script = hold
    async with listening(rig) as (told, _):
        stayer = asyncio.create_task(rig.infer(JSON_BODY | {"parameters": {"timeout": 2_000_000}}))
        await until(lambda: len(rig.worker.seen) == 1)
        leavers = [asyncio.create_task(rig.infer()) for _ in range(5)]
        await until(lambda: len(rig.worker.seen) == 6)
        await asyncio.sleep(0.15)  # the watch begins after a tenth of a second
        for leaver in leavers:
            leaver.cancel()
        await until(lambda: len(told) == 5)
        ids = [delivery.message.correlation_id for delivery in rig.worker.seen]
        assert [id_ in told for id_ in ids] == [False] + [True] * 5
        assert all(15_000 < at - time.time() * 1000 <= 30_000 for at in told._until.values())
        await until(lambda: counted(rig, 5))
        assert (await stayer).status_code == 504


async def counted(rig, number):
    return await rig.metric("roost_gateway_cancelled_total") == number


@contextlib.asynccontextmanager
async def working(rig, tmp_path):
    """A whole worker's agent, over an engine without torch."""
    engine, stop, ready = FakeEngine(), asyncio.Event(), asyncio.Event()
    config = WorkerConfig(
        worker_id="w0", device="cpu", budget_bytes=1 << 20, repository_url=str(rig.root),
        data_dir=str(tmp_path), report_interval_s=0.05,
    )  # fmt: skip
    worker = asyncio.create_task(
        run_worker(
            config,
            stop,
            broker=MemoryBroker(rig.exchange, "w0"),
            store=MemoryStore(rig.state),
            on_ready=lambda _: ready.set(),
            launch=engine.launch,
        )
    )
    try:
        async with asyncio.timeout(30):
            await ready.wait()
        await until(lambda: rig.state.note_listeners)
        yield engine
    finally:
        stop.set()
        async with asyncio.timeout(10):
            await worker


async def assign(rig, model):
    store = MemoryStore(rig.state)
    await store.put_assignment(
        Assignment(worker="w0", fence=1, generation=1, models=(Assigned(model),))
    )
    await store.hint(topic_assignment("w0"))


async def hung_up(rig):
    """The reply to the request whose client left finds nobody."""
    return await rig.metric('roost_gateway_stray_replies_total{kind="late"}') == 1


async def test_a_request_whose_client_hung_up_does_not_run(rig, tmp_path):
    """A worker takes its queue over after the client left: of two requests that wait there, one
    keeps off the device."""
    model = rig.register("late")
    await rig.worker.broker.declare_queue(model_queue(model))
    await rig.worker.broker.bind(model_queue(model), "late")
    async with working(rig, tmp_path) as engine:
        stayer = asyncio.create_task(rig.infer(name="late"))
        leaver = asyncio.create_task(rig.infer(name="late"))

        async def waiting():
            return await rig.worker.broker.depth(model_queue(model)) == 2

        await until(waiting)
        await asyncio.sleep(0.15)  # the watch begins after a tenth of a second
        leaver.cancel()
        await until(lambda: counted(rig, 1))
        await assign(rig, model)
        assert (await stayer).json()["outputs"][0]["data"] == [2.0, 4.0, 6.0]
        await until(lambda: hung_up(rig))
        assert sum(rows for _, rows in engine.batches) == 1


async def test_nor_does_one_that_a_worker_holds(rig, tmp_path):
    """It waits behind a batch, in the worker itself, as its client leaves."""
    model = rig.register("slow")
    await rig.worker.broker.declare_queue(model_queue(model))
    await rig.worker.broker.bind(model_queue(model), "slow")
    async with working(rig, tmp_path) as engine:
        await assign(rig, model)
        engine.gate.clear()

        def held():
            return sum(each.held for each in rig.state.reports["w0"][1].models)

        asked = [asyncio.create_task(rig.infer(name="slow"))]
        await until(lambda: held() == 1)  # and it runs: what comes now has to wait
        asked += [asyncio.create_task(rig.infer(name="slow")) for _ in range(3)]
        await until(lambda: held() == 4)
        await asyncio.sleep(0.15)  # the watch begins after a tenth of a second
        asked[-1].cancel()
        await until(lambda: hung_up(rig))
        engine.gate.set()
        assert [(await each).status_code for each in asked[:3]] == [200] * 3
        assert sum(rows for _, rows in engine.batches) == 3


async def test_those_who_hang_up_together_share_a_note():
    """And what could not be told is dropped, not kept for later."""
    state = MemoryState()
    metrics = Metrics()
    cancels = Cancels(MemoryStore(state), metrics)
    heard = asyncio.Queue()
    state.note_listeners.append((TOPIC_CANCELLED, heard))
    telling = asyncio.create_task(cancels.tell())
    try:
        async with asyncio.timeout(10):
            for asked in ("abc", "de"):
                for id_ in asked:
                    cancels.add(id_, asyncio.get_running_loop().time() + 10)
                now_ms = int(time.time() * 1000)
                assert CancelledRequests().note(await heard.get(), now_ms) == tuple(asked)
            state.reachable = False
            cancels.add("lost", asyncio.get_running_loop().time() + 10)
            while cancels._untold:
                await asyncio.sleep(0.001)
            state.reachable = True
            cancels.add("f", asyncio.get_running_loop().time() + 10)
            assert CancelledRequests().note(await heard.get(), 0) == ("f",)
        assert heard.empty()
    finally:
        telling.cancel()


async def test_nothing_is_said_of_requests_that_are_answered(rig):
    """The usual case costs nobody anything."""
    async with listening(rig) as (_, notes):
        for _ in range(20):
            assert (await rig.infer()).status_code == 200
        assert notes == []


async def test_without_a_store_a_hangup_is_still_noticed(rig):
    """Only the workers do not hear of it."""
    rig.worker.script = hold
    rig.state.reachable = False
    leaver = asyncio.create_task(rig.infer())
    await until(lambda: rig.worker.seen)
    leaver.cancel()
    line = 'roost_gateway_requests_total{code="client_closed",model="adder",version="1"}'

    async def noticed():
        return await rig.metric(line) == 1

    await until(noticed)
    assert await rig.metric("roost_gateway_cancelled_total") == 0
    rig.state.reachable = True


async def test_answers_that_are_not_read_count_as_memory(tmp_path, monkeypatch):
    """While slow readers hold too much, new requests are told to come later; they hold it for
    a bounded time."""
    monkeypatch.setattr("shared.http.protocol.SEND_TIMEOUT_S", 3.0)
    async with running(tmp_path, inflight_bytes_limit=12_000_000) as rig:
        spec = ModelSpec(inputs=(TensorSpec("x", "UINT8", (-1,)),))
        rig.worker.script = echo
        await rig.worker.bind(rig.register("wide", spec))
        header = json.dumps(
            {
                "inputs": [
                    {"name": "x", "datatype": "UINT8", "shape": [11_000_000],
                     "parameters": {"binary_data_size": 11_000_000}}
                ],
                "parameters": {"binary_data_output": True},
            }
        ).encode()  # fmt: skip
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", rig.port))
        _, writer = await asyncio.open_connection(sock=sock, limit=1024)
        writer.write(
            b"POST /v2/models/wide/infer HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n"
            b"Inference-Header-Content-Length: %d\r\n\r\n"
            % (len(header) + 11_000_000, len(header))
            + header
            + bytes(11_000_000)
        )
        await writer.drain()

        async def held():
            # The request's own bytes are given back before its answer is sent.
            answered = 'roost_gateway_requests_total{code="ok",model="wide",version="1"}'
            return await rig.metric(answered) and await rig.metric("roost_gateway_held_bytes")

        await until(held)
        length = {"Inference-Header-Content-Length": str(len(header))}
        large = await rig.infer(header + bytes(11_000_000), "wide", headers=length)
        assert large.status_code == 429
        assert "retry-after" in large.headers

        async def given_back():
            return await rig.metric("roost_gateway_held_bytes") == 0

        await until(given_back)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
