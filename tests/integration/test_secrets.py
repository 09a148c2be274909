"""What is asked, and what opens doors, stays between those whom it concerns: it is in no log line,
no metric, no trace, no report and nobody else's reply."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest

from services.worker import wire
from services.worker.core.events import Assigned
from shared import config, control, logs, names, packs
from shared.broker.amqp import AmqpBroker
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import Delivery, Message
from shared.config import CommonConfig, load
from shared.errors import RoostError
from shared.names import HEADER_CODE, ModelId
from shared.store.port import StoreUnavailable
from shared.store.redis import RedisStore
from tests.fuzz import engine
from tests.gateway_rig import until
from tests.logged import logged
from tests.traced_rig import traced

SAMPLED = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
SECRET = "s3cr3t-31337"
NUMBER = 31337.125
PASSWORD = "p4ss/w0rd@31337"
QUOTED = "p4ss%2Fw0rd%4031337"


def good(**changes) -> dict:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [-NUMBER, 2.0]}
    return {"inputs": [{**tensor, **changes}]}


BAD_BODIES = [
    b'{"inputs": [' + SECRET.encode(),
    b'{"inputs": [{"name": "x", "shape": [1,3], "datatype": "FP32", "data": ["' + SECRET.encode(),
    good(data=[SECRET, 1, 2]),
    good(datatype=SECRET),
    good(name=SECRET),
    good(shape=[1, SECRET]),
    {**good(), "parameters": {"priority": SECRET}},
    {**good(), "parameters": {SECRET: 1, "timeout": SECRET}},
    {**good(), "outputs": [{"name": SECRET}]},
    good(parameters={"binary_data_size": SECRET}),
    {**good(), "id": SECRET},
]
BAD_HEADERS = [
    "authorization", "cookie", "roost-deadline-ms", "inference-header-content-length",
    "content-encoding", "traceparent", "tracestate", "accept-encoding", "roost-split-key", "x-y",
]  # fmt: skip


def clean(text: str) -> None:
    for each in (SECRET, str(NUMBER), PASSWORD, QUOTED, "w0rd"):
        assert each not in text, text[max(text.find(each) - 300, 0) :][:600]


async def test_nothing_that_was_asked_is_told_to_others(tmp_path):
    """Bad JSON, wrong tensors, odd headers, messages of a producer that nobody can answer, and a
    model that fails with its input in its words: through all three services."""
    with logged("info") as lines:
        async with traced(tmp_path) as rig:
            rig.register("failtell")
            infer = "/v2/models/failtell/infer"
            for body in BAD_BODIES:
                content = body if isinstance(body, bytes) else msgspec.json.encode(body)
                refused = await rig.http.post(infer, content=content)
                assert refused.status_code >= 400, refused.text
            for header in BAD_HEADERS:
                await rig.http.post(infer, json=good(), headers={header: SECRET})
            told = await rig.http.post(infer, json=good(), headers=SAMPLED)
            assert told.headers[HEADER_CODE] == "model_failed"
            assert str(NUMBER) in told.text, "who asked may know"
            # Names are no secrets: they are addresses, and stand in logs and traces.
            assert (await rig.http.post("/v2/models/nobody/infer")).status_code == 404
            assert (await rig.http.get("/v2", params={"key": SECRET})).status_code == 200
            letters = await buried(rig.exchange)
            others = [*await rig.scraped(), (await rig.http.get("/v2/models/stats")).text]
            others += [span.to_json() for span in rig.spans()]
    assert "batch_failed" in lines.getvalue()
    assert rig.spans()
    for each in (lines.getvalue(), *others, *letters):
        clean(each)


async def buried(exchange: MemoryExchange) -> list[str]:
    """The reasons for which some messages became dead letters, which `roost dead` shows."""
    broker = MemoryBroker(exchange, "producer")
    await broker.start()
    reasons: list[str] = []
    body = msgspec.json.encode(good())
    message = Message(body=body, headers={"x": SECRET}, correlation_id="c1")
    bad_pack = Message(body=SECRET.encode(), content_type=packs.CONTENT_TYPE)
    for name in ("failtell", "failtell/1", "nobody"):
        for each in (message, bad_pack):
            await broker.publish(names.INFER_EXCHANGE, name, each)

    def read(delivery: Delivery) -> None:
        reasons.append(str(delivery.message.headers[names.HEADER_DEAD_REASON]))

    await broker.consume(names.DEAD, read, prefetch=100)
    await until(lambda: len(reasons) >= 6)
    await broker.close()
    return reasons


async def test_what_a_model_says_of_a_request_reaches_who_asked_alone():
    """Not the worker's log, its report to the placer, its metrics; printed by it, likewise."""
    with logged("info") as lines:
        worker = engine._Worker()
        agent, replies = worker.agent, []

        class Broker:
            async def publish(self, _, __, message, **___):
                replies.append(message.body)

        agent.replier._broker = Broker()
        tasks = [asyncio.create_task(agent.run()), asyncio.create_task(agent.runtime.run())]
        await engine._settled()
        worker.say(0, wire.pack(engine._STARTED))
        agent.tell(Assigned((ModelId("m/1"),)))
        await engine._settled()
        worker.say(0, wire.pack(engine._LOADED))
        await engine._settled()
        worker.ask(ModelId("m/1"), 1, packs=False)
        await engine._settled()
        worker.say(1, wire.pack(wire.BatchFailed(1, "model_failed", f"no: {SECRET}")))
        async with asyncio.timeout(30):
            while not replies:
                await asyncio.sleep(0.01)
        report = worker.teller.report()
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for each in worker.sockets:
            each.close()
    assert SECRET in replies[0].decode()
    assert "batch_failed" in lines.getvalue()
    clean(lines.getvalue())
    clean(repr(control.encode(report)))


@pytest.fixture
def settings(monkeypatch):
    """A service's settings with passwords; port 1 has nobody who listens."""
    monkeypatch.setattr(config, "secrets", set())
    monkeypatch.setattr(logs, "secrets", config.secrets)
    return load(
        CommonConfig,
        "X",
        {
            "ROOST_AMQP_URL": f"amqp://user:{QUOTED}@127.0.0.1:1/",
            "ROOST_REDIS_URL": f"redis://:{QUOTED}@127.0.0.1:1/0",
            "ROOST_REPOSITORY_URL": f"s3://key:{QUOTED}@bucket/models?secret_key={SECRET}",
        },
    )


def test_settings_are_described_without_passwords(settings):
    """As they stand in the first line of a service's log."""
    clean(repr(config.describe(settings)))


async def test_drivers_do_not_tell_passwords(settings):
    """Whatever they say of a broker and a store that are not there."""
    with logged("info") as lines:
        broker = AmqpBroker(settings.amqp_url, "test")
        starting = asyncio.create_task(broker.start())
        async with asyncio.timeout(30):
            while "no connection to the broker" not in lines.getvalue():
                await asyncio.sleep(0.01)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, RoostError):
            await starting
        await broker.close()
        store = RedisStore(settings.redis_url)
        with pytest.raises(StoreUnavailable) as away:
            await store.start()
        await store.close()
    clean(lines.getvalue())
    clean(str(away.value) + repr(away.value))
