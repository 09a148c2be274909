"""The users of deploy/rabbitmq and deploy/redis: each can do its work, and no more."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pika
import pika.exceptions
import pytest
from redis import exceptions
from redis.asyncio import Redis

from roost.local.rabbit import RabbitNode
from roost.local.redis import RedisNode
from shared.broker.amqp import AmqpBroker
from shared.broker.policies import POLICIES, _definition
from shared.broker.port import Broker, BrokerUnavailable, Message
from shared.control import Assignment, Report
from shared.names import DEAD, DIRECT_REPLY_PREFIX, INFER_EXCHANGE, UNROUTED, reply_to_allowed
from shared.store.redis import RedisStore

pytestmark = pytest.mark.services

DEPLOY = Path(__file__).parents[2] / "deploy"
DEFINITIONS = json.loads((DEPLOY / "rabbitmq" / "definitions.json").read_text())
USERS = [each["name"] for each in DEFINITIONS["users"]]
QUEUE = "roost.model.adder.1"
OTHERS = "roost.reply.producer-b.1"
OWN = "roost.reply.producer-a.1"


class Site:
    """A virtual host with the definitions, and URLs by user."""

    def __init__(self, node: RabbitNode, vhost: str) -> None:
        self.node = node
        self.vhost = vhost
        self.url = node.vhost_url(vhost)

    def of(self, user: str) -> str:
        return self.url.replace("guest:guest@", f"{user}:secret@")


@pytest.fixture(scope="module")
def site(rabbit_node) -> Iterator[Site]:
    """As the recipe says: the definitions are imported, and each user gets a password."""
    vhost = f"test-{uuid.uuid4().hex[:12]}"
    rabbit_node.create_vhost(vhost)
    text = json.dumps(DEFINITIONS).replace('"vhost": "/"', f'"vhost": "{vhost}"')
    definitions = json.loads(text)
    for user in definitions["users"]:
        user["password"] = "secret"
        del user["password_hash"], user["hashing_algorithm"]
    rabbit_node.api("POST", "/api/definitions", json.dumps(definitions).encode())
    yield Site(rabbit_node, vhost)
    rabbit_node.delete_vhost(vhost)
    for user in USERS:
        rabbit_node.api("DELETE", f"/api/users/{user}")


async def opened(site: Site, user: str) -> Broker:
    broker = AmqpBroker(site.of(user), user)
    async with asyncio.timeout(60):
        await broker.start()
    return broker


@pytest.fixture
async def worker(site) -> AsyncIterator[Broker]:
    """A worker's connections, and a model's queue that the placer has made and bound."""
    placer = await opened(site, "roost-placer")
    await placer.declare_queue(QUEUE)
    await placer.bind(QUEUE, "adder")
    await placer.close()
    made = await opened(site, "roost-worker")
    yield made
    await made.close()


def channel_of(site: Site, user: str) -> tuple[pika.BlockingConnection, Any]:
    connection = pika.BlockingConnection(pika.URLParameters(site.of(user)))
    channel = connection.channel()
    channel.confirm_delivery()
    return connection, channel


def test_the_definitions_are_what_the_services_declare():
    """Exchanges, queues, arguments and limits: a difference would refuse a declaration."""
    assert {each["name"] for each in DEFINITIONS["exchanges"]} == {INFER_EXCHANGE, UNROUTED, DEAD}
    assert {each["name"] for each in DEFINITIONS["queues"]} == {UNROUTED, DEAD}
    found = {each["name"]: each for each in DEFINITIONS["policies"]}
    for policy in POLICIES:
        wanted = {"vhost": "/", "name": policy.name, **_definition(policy)}
        assert found.pop(policy.name) == wanted
    assert not found


def test_nobody_has_a_password_until_it_is_given_one():
    """The file holds no secret, and nobody can log in by what it holds."""
    assert {user["password_hash"] for user in DEFINITIONS["users"]} == {""}


async def test_a_producer_asks_and_gets_its_answer(site, worker):
    """Its own reply queue, a publish that is confirmed, a worker's answer in it."""
    deliveries: asyncio.Queue[Any] = asyncio.Queue()
    consumer = await worker.consume(QUEUE, deliveries.put_nowait, prefetch=4)

    def ask() -> Any:
        connection, channel = channel_of(site, "producer-a")
        channel.queue_declare(OWN, durable=True, arguments={"x-expires": 60_000})
        properties = pika.BasicProperties(
            reply_to=OWN, correlation_id="1", user_id="producer-a", delivery_mode=2
        )
        channel.basic_publish(INFER_EXCHANGE, "adder", b"x", properties, mandatory=True)
        for _, properties, body in channel.consume(OWN, auto_ack=True, inactivity_timeout=60):
            connection.close()
            return properties.correlation_id, body
        raise AssertionError("no answer")

    asking = asyncio.ensure_future(asyncio.to_thread(ask))
    delivery = await asyncio.wait_for(deliveries.get(), 60)
    reply = Message(body=b"y", correlation_id=delivery.message.correlation_id)
    await worker.publish("", delivery.message.reply_to, reply)
    await delivery.ack()
    assert await asking == ("1", b"y")
    await consumer.cancel()


def refusal(channel: Any, attempt: Callable[[Any], Any]) -> int | None:
    """With which code the broker closed the channel over it; None: it did not."""
    try:
        attempt(channel)
    except pika.exceptions.ChannelClosedByBroker as error:
        return error.reply_code
    return None


def publish(exchange: str, key: str, **properties: Any) -> Callable[[Any], None]:
    asks = {"reply_to": OWN, "correlation_id": "1", **properties}
    return lambda channel: channel.basic_publish(exchange, key, b"x", pika.BasicProperties(**asks))


REFUSED: dict[str, Callable[[Any], Any]] = {
    "publishes to the exchange of what has no route": publish(UNROUTED, ""),
    "publishes to the exchange of dead letters": publish(DEAD, ""),
    "publishes straight into a model's queue": publish("", QUEUE),
    "publishes straight into its own reply queue": publish("", OWN),
    "publishes to another exchange": publish("amq.fanout", ""),
    "calls itself another user": publish(INFER_EXCHANGE, "adder", user_id="producer-b"),
    "reads a model's queue": lambda channel: channel.basic_get(QUEUE),
    "reads what has no route": lambda channel: channel.basic_get(UNROUTED),
    "reads dead letters": lambda channel: channel.basic_get(DEAD),
    "reads another's answers": lambda channel: channel.basic_get(OTHERS),
    "consumes another's answers": lambda channel: channel.basic_consume(OTHERS, print),
    "makes a queue of another's name": lambda channel: channel.queue_declare(OTHERS + "x"),
    "makes a model's queue": lambda channel: channel.queue_declare("roost.model.b.1"),
    "makes a queue of any name": lambda channel: channel.queue_declare("mine"),
    "has the broker name its queue": lambda channel: channel.queue_declare(""),
    "makes an exchange": lambda channel: channel.exchange_declare("mine"),
    "deletes the exchange": lambda channel: channel.exchange_delete(INFER_EXCHANGE),
    "deletes a model's queue": lambda channel: channel.queue_delete(QUEUE),
    "deletes another's reply queue": lambda channel: channel.queue_delete(OTHERS),
    "purges a model's queue": lambda channel: channel.queue_purge(QUEUE),
    "purges another's reply queue": lambda channel: channel.queue_purge(OTHERS),
    "takes a model's requests": lambda channel: channel.queue_bind(OWN, INFER_EXCHANGE, "adder"),
    "takes what has no route": lambda channel: channel.queue_bind(OWN, UNROUTED),
    "takes a model's route away": lambda channel: channel.queue_unbind(
        QUEUE, INFER_EXCHANGE, "adder"
    ),
    "leads dead answers past the rules": lambda channel: channel.queue_declare(
        OWN + ".dlx", arguments={"x-dead-letter-exchange": UNROUTED}
    ),
}


@pytest.fixture
def queues(site) -> None:
    """What a producer might like to touch, and its own."""
    for name in (QUEUE, OTHERS, OWN):
        path = f"/api/queues/{quote(site.vhost)}/{name}"
        arguments = {"x-queue-type": "classic"} if name == QUEUE else {"x-expires": 60_000}
        body = {"durable": True, "arguments": arguments}
        site.node.api("PUT", path, json.dumps(body).encode())


def test_a_producer_can_do_nothing_else(site, queues):
    """Each of these closes its channel with ACCESS_REFUSED (a forged user: PRECONDITION_FAILED)."""
    connection, channel = channel_of(site, "producer-a")
    for what, attempt in REFUSED.items():
        code = refusal(channel, attempt)
        assert code == (406 if "calls itself" in what else 403), f"a producer {what}: {code}"
        channel = connection.channel()
        channel.confirm_delivery()
    channel.basic_get(OWN)  # the connection is whole, and its own queue is its own
    connection.close()


def test_a_producer_has_no_management(site):
    """Nor do the services, but for the placer, which may lay down policies and see what it owns."""
    with httpx.Client(base_url=site.node.management_url.replace("guest:guest@", "")) as client:
        for user in USERS:
            answer = client.get("/api/overview", auth=(user, "secret"))
            assert answer.is_success == (user == "roost-placer"), user
        assert not client.get("/api/users", auth=("roost-placer", "secret")).is_success


@pytest.mark.parametrize(
    "queue", [INFER_EXCHANGE, UNROUTED, DEAD, QUEUE, "roost.jobs.0", "mine", "", "roost.reply"]
)
def test_what_a_worker_may_answer_to_is_not_the_producer_s_choice(queue):
    """It has the right to publish to every queue, so it looks at the name itself."""
    assert not reply_to_allowed(queue)
    assert reply_to_allowed(OWN)


MAY_NOT: dict[str, dict[str, Callable[[Any], Any]]] = {
    "roost-gateway": {
        "reads a model's queue": lambda channel: channel.basic_get(QUEUE),
        "deletes a model's queue": lambda channel: channel.queue_delete(QUEUE),
        "reads dead letters": lambda channel: channel.basic_get(DEAD),
        "takes a model's requests": lambda channel: channel.queue_bind(
            OWN, INFER_EXCHANGE, "adder"
        ),
        "deletes the exchange": lambda channel: channel.exchange_delete(INFER_EXCHANGE),
    },
    "roost-placer": {
        "reads answers": lambda channel: channel.basic_get(OWN),
        "deletes a reply queue": lambda channel: channel.queue_delete(OWN),
        "makes a queue of any name": lambda channel: channel.queue_declare("mine"),
    },
    "roost-worker": {
        "asks models": publish(INFER_EXCHANGE, "adder"),
        "publishes as if it had no route": publish(UNROUTED, ""),
        "reads answers": lambda channel: channel.basic_get(OWN),
        "reads what has no route": lambda channel: channel.basic_get(UNROUTED),
        "reads dead letters": lambda channel: channel.basic_get(DEAD),
        "takes another model's requests": lambda channel: channel.queue_bind(
            QUEUE, INFER_EXCHANGE, "other"
        ),
        "deletes a reply queue": lambda channel: channel.queue_delete(OWN),
        "deletes the exchange": lambda channel: channel.exchange_delete(INFER_EXCHANGE),
    },
}


@pytest.mark.parametrize("user", MAY_NOT)
def test_a_service_can_do_its_work_only(site, queues, user):
    """What it never does is refused to it too."""
    connection, channel = channel_of(site, user)
    for what, attempt in MAY_NOT[user].items():
        code = refusal(channel, attempt)
        assert code == 403, f"{user} {what}: {code}"
        channel = connection.channel()
        channel.confirm_delivery()
    connection.close()


async def test_a_gateway_s_user_can_do_a_gateway_s_work(site):
    """Its reply queue, jobs, publishing; the topology is there, and it need not own it."""
    broker = await opened(site, "roost-gateway")
    try:
        for queue in ("roost.reply.g1", "roost.jobs.0"):
            await broker.declare_queue(queue, expires_s=60)
            got: asyncio.Queue[Any] = asyncio.Queue()
            consumer = await broker.consume(queue, got.put_nowait, prefetch=4)
            await broker.publish("", queue, Message(body=b"x", reply_to=queue))
            delivery = await asyncio.wait_for(got.get(), 60)
            await delivery.dead_letter("test")
            await consumer.cancel()
        await broker.publish(
            INFER_EXCHANGE, "nobody", Message(body=b"x", reply_to="roost.reply.g1")
        )
        assert await broker.depth("roost.jobs.0") == 0
        assert await broker.delete_queue("roost.reply.g1")
    finally:
        await broker.close()


async def test_a_placer_s_user_can_do_a_placer_s_work(site):
    """It makes the topology, takes what has no route, makes, binds, unbinds and deletes queues."""
    queue = "roost.model.placed.1"
    broker = await opened(site, "roost-placer")
    try:
        await broker.declare_queue(queue)
        await broker.bind(queue, "placed")
        await broker.publish("", queue, Message(body=b"x", reply_to=OWN))
        got: asyncio.Queue[Any] = asyncio.Queue()
        consumer = await broker.consume(queue, got.put_nowait, prefetch=4)
        await (await asyncio.wait_for(got.get(), 60)).dead_letter("test")
        await consumer.cancel()
        await broker.unbind(queue, "placed")
        unrouted = await broker.consume(UNROUTED, lambda _: None, prefetch=4)
        await unrouted.cancel()
        assert await broker.delete_queue(queue)
    finally:
        await broker.close()


async def test_an_operator_s_user_can_replay_dead_letters(site):
    """What `roost dead` does: read them, send them again."""
    broker = await opened(site, "roost-operator")
    try:
        placer = await opened(site, "roost-placer")
        await placer.publish(DEAD, "", Message(body=b"x", reply_to=OWN))
        await placer.close()
        got: asyncio.Queue[Any] = asyncio.Queue()
        consumer = await broker.consume(DEAD, got.put_nowait, prefetch=4)
        delivery = await asyncio.wait_for(got.get(), 60)
        await broker.publish(INFER_EXCHANGE, "nobody", Message(body=b"x", reply_to=OWN))
        await delivery.ack()
        await consumer.cancel()
    finally:
        await broker.close()


async def test_a_producer_may_use_direct_reply_to(site, worker):
    """Which needs no queue, and so no right to make one."""
    deliveries: asyncio.Queue[Any] = asyncio.Queue()
    consumer = await worker.consume(QUEUE, deliveries.put_nowait, prefetch=4)

    def ask() -> bytes:
        connection, channel = channel_of(site, "producer-a")
        answers: list[bytes] = []
        channel.basic_consume(
            "amq.rabbitmq.reply-to",
            lambda _channel, _method, _properties, body: answers.append(body),
            auto_ack=True,
        )
        properties = pika.BasicProperties(reply_to="amq.rabbitmq.reply-to", correlation_id="1")
        channel.basic_publish(INFER_EXCHANGE, "adder", b"x", properties, mandatory=True)
        while not answers:
            connection.process_data_events(time_limit=60)
        connection.close()
        return answers[0]

    asking = asyncio.ensure_future(asyncio.to_thread(ask))
    delivery = await asyncio.wait_for(deliveries.get(), 60)
    reply_to = delivery.message.reply_to
    assert reply_to.startswith(DIRECT_REPLY_PREFIX)
    await worker.publish("", reply_to, Message(body=b"y", correlation_id="1"), mandatory=False)
    await delivery.ack()
    assert await asking == b"y"
    await consumer.cancel()


async def test_a_user_that_may_not_make_the_topology_waits_for_it(site, rabbit_node):
    """On a broker that lost everything a worker says what is missing, and comes up when the
    placer has made it."""
    vhost = f"test-{uuid.uuid4().hex[:12]}"
    rabbit_node.create_vhost(vhost)
    for each in DEFINITIONS["permissions"]:
        body = {key: each[key] for key in ("configure", "write", "read")}
        path = f"/api/permissions/{vhost}/{each['user']}"
        rabbit_node.api("PUT", path, json.dumps(body).encode())
    empty = Site(rabbit_node, vhost)
    worker = AmqpBroker(empty.of("roost-worker"), "worker")
    starting = asyncio.create_task(worker.start())
    try:
        done, _ = await asyncio.wait({starting}, timeout=0.5)
        assert not done
        placer = await opened(empty, "roost-placer")
        await asyncio.wait_for(starting, 60)
        await placer.close()
        with pytest.raises(BrokerUnavailable, match="ACCESS_REFUSED"):
            await worker.declare_queue("roost.reply.mine")
    finally:
        starting.cancel()
        await worker.close()
        rabbit_node.delete_vhost(vhost)


# --- Redis ---------------------------------------------------------------------------------

REPORT = Report(
    worker="w1", incarnation="i", seq=1, at=1.0, device_kind="cpu", device_name="cpu",
    budget_bytes=1, used_bytes=0, measured_bytes=0,
)  # fmt: skip
ASSIGNMENT = Assignment(worker="w1", fence=1, generation=1)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[RedisNode]:
    """A Redis of its own, with the users of deploy/redis (the default one stays, for the node)."""
    node = RedisNode(tmp_path_factory.mktemp("redis"))
    node.start()
    yield node
    node.kill()


@pytest.fixture
async def users(guarded) -> AsyncIterator[Callable[[str], str]]:
    admin = Redis.from_url(guarded.url)
    await admin.flushall()
    for line in (DEPLOY / "redis" / "users.acl").read_text().splitlines():
        _, user, *rules = line.split()
        if user != "default":
            rules = [f">secret-{user}" if rule == "nopass" else rule for rule in rules]
            await admin.execute_command("ACL", "SETUSER", user, "reset", *rules)
    yield lambda user: guarded.url.replace("redis://", f"redis://{user}:secret-{user}@")
    await admin.aclose()


async def test_each_service_s_user_can_do_its_work_in_the_store(users):
    """All that gateway, placer and worker ask of the store, as their users."""
    gateway, placer, worker = (
        RedisStore(users(f"roost-{service}")) for service in ("gateway", "placer", "worker")
    )
    try:
        for store in (gateway, placer, worker):
            await store.start()
        await worker.put_report(REPORT, 30)
        await worker.hint("reports")
        assert [each.worker for each in await placer.reports()] == ["w1"]
        assert [each.worker for each in await gateway.reports()] == ["w1"]
        assert await placer.acquire_lease("p1", 30) is not None
        assert await placer.put_assignment(ASSIGNMENT)
        assert await placer.epoch()
        await placer.add_active("a/1")
        assert await placer.active() == {"a/1"}
        await placer.remove_active("a/1")
        for topic in ("assignment.w1", "registry", "lease"):
            await placer.hint(topic)
        assert (await worker.assignment("w1")).generation == 1
        await gateway.put_tallies("g1", {"a/1": b"x"}, 30)
        assert await gateway.tallies(["a/1"]) == {"g1": {"a/1": b"x"}}
        await gateway.note("cancelled", b"x")
        await gateway.hint("registry")
        hints = worker.hints("assignment.w1")
        assert await asyncio.wait_for(anext(hints), 30) == "assignment.w1"
        await hints.aclose()
        await worker.remove_report("w1")
        await placer.release_lease("p1")
    finally:
        for store in (gateway, placer, worker):
            await store.close()


FORBIDDEN = {
    "roost-gateway": [
        ("set", "roost:{w:w1}:report", "x"), ("hset", "roost:{w:w1}:assignment", "a", "b"),
        ("get", "roost:{pl}:lease"), ("publish", "roost:hint:lease", "x"), ("get", "other"),
    ],
    "roost-placer": [
        ("set", "roost:{w:w1}:report", "x"), ("hget", "roost:{g:g1}:tallies", "a"),
        ("set", "other", "x"),
    ],
    "roost-worker": [
        ("get", "roost:{pl}:lease"), ("set", "roost:{pl}:lease", "x"), ("set", "roost:epoch", "x"),
        ("hset", "roost:{w:w1}:assignment", "fence", "9"), ("eval", "return 1", 0),
        ("publish", "roost:hint:lease", "x"),
    ],
}  # fmt: skip
EVERYBODY = [
    ("flushall",), ("flushdb",), ("keys", "*"), ("scan", 0), ("config", "set", "maxmemory", "1"),
    ("acl", "list"), ("shutdown",), ("monitor",), ("client", "list"),
    ("client", "kill", "id", "1"), ("module", "list"), ("replicaof", "127.0.0.1", "1"),
]  # fmt: skip


@pytest.mark.parametrize("user", FORBIDDEN)
async def test_no_service_s_user_can_do_more_in_the_store(users, user):
    """Others' keys, others' channels, and whatever concerns the server."""
    client = Redis.from_url(users(user))
    try:
        for command in (*FORBIDDEN[user], *EVERYBODY):
            with pytest.raises(exceptions.NoPermissionError):  # `command` is shown if not
                await client.execute_command(*command)
    finally:
        await client.aclose()
