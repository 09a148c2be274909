"""TLS on real parts: RabbitMQ, its management, Redis, the gateway's HTTP and gRPC, the worker's
metrics; with an authority that lives as long as the tests."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import structlog
from prometheus_client import CollectorRegistry

from roost import probe
from roost.__main__ import main
from roost.client import RoostClient
from roost.local.rabbit import RabbitNode
from roost.local.redis import RedisNode
from services.gateway.grpc import health_pb2
from services.worker.http import Readiness, serving
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.policies import POLICIES, apply_policies
from shared.broker.port import Message
from shared.config import ConfigError
from shared.connect import open_broker, open_store
from shared.errors import Unavailable
from shared.store.port import StoreUnavailable
from shared.tls import SYSTEM, ClientTls
from tests.authority import Authority
from tests.gateway_rig import running, until

pytestmark = pytest.mark.services

QUEUE = "roost.reply.tls"


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def rabbit(tmp_path_factory, authority) -> Iterator[RabbitNode]:
    """It lets in only those with a certificate of the authority."""
    node = RabbitNode(
        tmp_path_factory.mktemp("rabbit"),
        tls=authority.server("rabbit", "localhost", clients=authority.ca_file),
    )
    node.start()
    yield node
    node.kill()


@pytest.fixture(scope="module")
def redis(tmp_path_factory, authority) -> Iterator[RedisNode]:
    """It lets in only those with a certificate of the authority."""
    node = RedisNode(
        tmp_path_factory.mktemp("redis"),
        tls=authority.server("redis", "localhost", clients=authority.ca_file),
    )
    node.start()
    yield node
    node.kill()


def amqps(node: RabbitNode, host: str = "localhost") -> str:
    return f"amqps://guest:guest@{host}:{node.tls_port}/"


async def why_not_broker(url: str, tls: ClientTls) -> str:
    """The first line that the log has for it."""
    with structlog.testing.capture_logs() as logs:
        broker = open_broker(url, "test", tls)
        starting = asyncio.create_task(broker.start())
        try:
            async with asyncio.timeout(30):
                while not (found := [each for each in logs if "error" in each]):
                    await asyncio.sleep(0.01)
        finally:
            starting.cancel()
            await broker.close()
    return str(found[0]["error"])


async def test_messages_travel_by_amqps(rabbit, authority):
    """Published, confirmed and consumed over two encrypted connections."""
    broker = open_broker(amqps(rabbit), "test", authority.client("service"))
    await broker.start()
    try:
        await broker.declare_queue(QUEUE, expires_s=60)
        got: asyncio.Queue[Any] = asyncio.Queue()
        consumer = await broker.consume(QUEUE, got.put_nowait, prefetch=1)
        await broker.publish("", QUEUE, Message(body=b"x" * 300_000))
        delivery = await asyncio.wait_for(got.get(), 30)
        assert len(delivery.message.body) == 300_000
        await delivery.ack()
        await consumer.cancel()
    finally:
        await broker.close()
    peers = rabbit.ctl("list_connections", "ssl", "--quiet")
    assert "false" not in peers


async def test_a_broker_that_is_not_the_right_one_is_refused(rabbit, authority, stranger):
    """By who signed it, and by its name; the log says so in a line."""
    unknown = await why_not_broker(amqps(rabbit), stranger.client())
    assert "its certificate is refused" in unknown
    named = await why_not_broker(amqps(rabbit, "127.0.0.1"), authority.client("service"))
    assert "IP address mismatch" in named, named
    other = await why_not_broker(amqps(rabbit), SYSTEM)
    assert "its certificate is refused" in other


async def test_the_wrong_scheme_for_the_broker_is_told(rabbit, authority):
    """Plain AMQP on the TLS port, and TLS on the plain one."""
    plain = amqps(rabbit).replace("amqps:", "amqp:")
    assert "must begin with amqps://" in await why_not_broker(plain, SYSTEM)
    secure = rabbit.amqp_url.replace("amqp:", "amqps:")
    told = await why_not_broker(secure, authority.client("service"))
    assert "no TLS is spoken there" in told, told


async def test_a_broker_that_asks_for_a_certificate_gets_none(rabbit, authority):
    """The connection is refused; it is tried again, and nothing is sent in plain."""
    told = await why_not_broker(amqps(rabbit), authority.client())
    assert "ROOST_AMQP_CERT_FILE" in told or "..._CERT_FILE" in told, told


async def test_files_are_read_anew_for_each_connection(rabbit, authority, stranger):
    """A connection that is lost comes back with what is in them then; until that will do, the log
    says why it does not."""
    tls = authority.client("renewed")
    broker = open_broker(amqps(rabbit), "renewed", tls)
    await broker.start()
    try:
        good = Path(tls.cert_file).read_bytes(), Path(tls.key_file).read_bytes()
        for file, other in zip((tls.cert_file, tls.key_file), stranger.issue(), strict=True):
            Path(file).write_bytes(Path(other).read_bytes())
        with structlog.testing.capture_logs() as logs:
            await broker._publishing.now().connection.close()
            async with asyncio.timeout(60):
                while not any("error" in each for each in logs):
                    await asyncio.sleep(0.01)
        for file, content in zip((tls.cert_file, tls.key_file), good, strict=True):
            Path(file).write_bytes(content)
        async with asyncio.timeout(60):
            await broker._publishing.up()
    finally:
        await broker.close()


def test_policies_are_laid_down_over_https(rabbit, authority, stranger):
    """The management API has the broker's certificate."""
    url = f"https://guest:guest@localhost:{rabbit.management_tls_port}"
    apply_policies(url, tls=authority.client("service"))
    assert rabbit.api("GET", "/api/policies").count(b'"roost-') == len(POLICIES)
    with pytest.raises(Unavailable, match="its certificate is refused"):
        apply_policies(url, tls=stranger.client())
    plain = rabbit.management_url.replace("http:", "https:")
    with pytest.raises(Unavailable, match="no TLS is spoken there"):
        apply_policies(plain, tls=authority.client())


async def test_the_store_is_reached_by_rediss(redis, authority):
    """Commands, scripts, and hints, which have connections of their own."""
    url = f"rediss://localhost:{redis.tls_port}/0"
    store = open_store(url, authority.client("service"))
    await store.start()
    try:
        assert await store.acquire_lease("a", 5)
        hints = store.hints("models")
        assert await asyncio.wait_for(anext(hints), 30) == "models"  # subscribed
        await store.hint("models")
        assert await asyncio.wait_for(anext(hints), 30) == "models"
        await hints.aclose()
    finally:
        await store.close()


async def why_not_store(url: str, tls: ClientTls) -> str:
    store = open_store(url, tls)
    try:
        with pytest.raises(StoreUnavailable) as caught:
            await store.start()
    finally:
        await store.close()
    return str(caught.value)


async def test_a_store_that_is_not_the_right_one_is_refused(redis, authority, stranger):
    """Unknown authorities, no certificate of ours, the wrong scheme both ways."""
    url = f"rediss://localhost:{redis.tls_port}/0"
    assert "its certificate is refused" in await why_not_store(url, stranger.client())
    assert "its certificate is refused" in await why_not_store(url, SYSTEM)
    assert await why_not_store(url, authority.client())
    assert await why_not_store(f"redis://localhost:{redis.tls_port}/0", SYSTEM)
    missing = ClientTls(setting="ROOST_REDIS", ca_file="/none.pem")
    assert "ROOST_REDIS_CA_FILE: cannot read /none.pem" in await why_not_store(url, missing)
    plain = await why_not_store(redis.url.replace("redis:", "rediss:"), authority.client())
    assert "the store cannot be reached" in plain


@pytest.mark.parametrize(
    "url", ["amqps://h/?no_verify_ssl=1", "amqps://h/?cafile=x", "rediss://h/0?ssl_cert_reqs=none"]
)
def test_a_url_cannot_turn_verification_off(url):
    """The drivers' own options for TLS are refused, not ignored."""
    with pytest.raises(ConfigError, match="is not taken from a URL"):
        (open_broker(url, "test") if url.startswith("amqp") else open_store(url))


@pytest.fixture
async def gateway(tmp_path, authority) -> AsyncIterator[Any]:
    """A gateway with TLS on both of its ports, that lets in whom the authority has signed."""
    cert, key = authority.issue("gateway")
    settings = {"tls_cert_file": cert, "tls_key_file": key, "grpc_port": 0}
    settings["tls_client_ca_file"] = authority.ca_file
    async with running(tmp_path, connect=False, **settings) as rig:
        async with channel(f"localhost:{rig.grpc_port}", authority.client("rig")) as over:
            await until(lambda: healthy(over))
        yield rig


async def test_the_client_and_the_command_speak_https(gateway, authority, monkeypatch, capsys):
    """With a CA file that is given or in the environment; without one the system's count."""
    url = f"https://localhost:{gateway.port}"
    cert, key = authority.issue("user", "client.test")

    def ask() -> Any:
        with RoostClient(url, ca_file=authority.ca_file, cert_file=cert, key_file=key) as client:
            return client.infer("adder", {"x": np.array([[1, 2, 3]], np.float32)}, timeout_s=60)

    answer = await asyncio.to_thread(ask)
    np.testing.assert_array_equal(answer["y"], [[2, 3, 4]])

    assert await asyncio.to_thread(main, ["ls", "--url", url]) == 1
    assert "its certificate is refused" in capsys.readouterr().err
    monkeypatch.setenv("ROOST_CA_FILE", "/none.pem")
    assert await asyncio.to_thread(main, ["ls", "--url", url]) == 1
    assert "ROOST_CA_FILE: cannot read /none.pem" in capsys.readouterr().err
    monkeypatch.setenv("ROOST_CERT_FILE", cert)
    monkeypatch.setenv("ROOST_KEY_FILE", key)
    arguments = ["ls", "--url", url, "--ca-file", authority.ca_file]
    assert await asyncio.to_thread(main, arguments) == 0
    assert "adder" in capsys.readouterr().out


async def test_the_probe_asks_the_service_beside_it(gateway, authority, monkeypatch):
    """By the container's settings, whatever scheme its command has."""
    cert, key = authority.issue("beside")
    address = f"http://127.0.0.1:{gateway.port}/v2/health/ready"
    monkeypatch.setattr("sys.argv", ["probe", address])
    for name, value in (("CERT", cert), ("KEY", key), ("CLIENT_CA", authority.ca_file)):
        monkeypatch.setenv(f"ROOST_TLS_{name}_FILE", value)
    assert await asyncio.to_thread(probe.main) == 0


@contextlib.asynccontextmanager
async def channel(address: str, tls: ClientTls) -> AsyncIterator[grpc.aio.Channel]:
    def read(file: str) -> bytes | None:
        if not file:
            return None
        return Path(file).read_bytes()

    credentials = grpc.ssl_channel_credentials(
        read(tls.ca_file), read(tls.key_file), read(tls.cert_file)
    )
    # Not from a pool: each is a handshake of its own.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(address, credentials, options) as made:
        yield made


async def healthy(over: grpc.aio.Channel) -> bool:
    check = over.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return (await check(health_pb2.HealthCheckRequest(), timeout=30)).status == 1


async def test_grpc_shows_its_certificate_and_asks_for_one(gateway, authority, stranger):
    """As over HTTP: a stranger's is refused, and so is none, and plain text."""
    address = f"localhost:{gateway.grpc_port}"
    async with channel(address, authority.client("caller")) as over:
        assert await healthy(over)
    cert, key = stranger.issue("caller", "client.test")
    unknown = ClientTls(ca_file=authority.ca_file, cert_file=cert, key_file=key)
    for refused in (authority.client(), unknown, stranger.client()):
        async with channel(address, refused) as over:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await healthy(over)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    async with grpc.aio.insecure_channel(address) as over:
        with pytest.raises(grpc.aio.AioRpcError):
            await healthy(over)


async def test_grpc_shows_a_renewed_certificate_without_dropping_calls(tmp_path, stranger):
    """A channel that was open goes on, and a new one is shown the other authority's."""
    cert, key = Authority(tmp_path, "first").issue("gateway")
    first = ClientTls(ca_file=str(tmp_path / "first.pem"))
    settings = {"tls_cert_file": cert, "tls_key_file": key, "grpc_port": 0}
    async with running(tmp_path, connect=False, **settings) as rig:
        address = f"localhost:{rig.grpc_port}"
        async with channel(address, first) as open_before:
            await until(lambda: healthy(open_before))
            second = Authority(tmp_path, "second")
            second.issue("gateway")
            async with channel(address, second.client()) as over:
                assert await healthy(over)
            assert await healthy(open_before)
            async with channel(address, first) as over:
                with pytest.raises(grpc.aio.AioRpcError):
                    await healthy(over)


def test_a_worker_serves_its_metrics_encrypted(authority, stranger):
    """And its readiness; plain text gets nothing, and holds nobody up."""
    readiness = Readiness(MemoryBroker(MemoryExchange(), "worker"), 1.0)
    tls = authority.server("worker")
    with serving("127.0.0.1", 0, CollectorRegistry(), readiness, tls) as port:
        url = f"https://localhost:{port}/metrics"
        with pytest.raises(OSError):
            urllib.request.urlopen(url.replace("https:", "http:"), timeout=30)
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(url, timeout=30, context=stranger.client().context())
        for _ in range(2):
            trusted = authority.client().context()
            with urllib.request.urlopen(url, timeout=30, context=trusted) as answer:
                assert answer.status == 200
            authority.issue("worker")
