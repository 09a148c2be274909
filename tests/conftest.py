"""Private RabbitMQ and Redis for the tests that want them: one of each per session.

`amqp_url` is a fresh virtual host, `redis_url` an empty Redis, per test. Whoever uses them
(also through another fixture) carries the marker `services`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator

import pytest

from roost.local import MissingService, find_binaries
from roost.local.rabbit import RabbitNode
from roost.local.redis import RedisNode
from shared.broker.amqp import AmqpBroker

SERVICE_FIXTURES = {"rabbit_node", "redis_node", "amqp_url", "redis_url"}
NO_SERVICES = "ROOST_TEST_NO_SERVICES"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SERVICE_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.services)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Here and not in the fixtures: tests that start nodes of their own are marked by hand.
    if item.get_closest_marker("services") is None:
        return
    if os.environ.get(NO_SERVICES) == "1":
        pytest.skip(f"{NO_SERVICES}=1: no RabbitMQ and Redis are started")
    try:
        find_binaries()
    except MissingService as error:
        # Not a skip: a run without the brokers must not look like one that passed.
        pytest.fail(f"{error} (or {NO_SERVICES}=1 to skip these tests)", pytrace=False)


@pytest.fixture(scope="session")
def rabbit_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitNode]:
    """A broker with management. Tests that stop or hurt it start one of their own."""
    node = RabbitNode(tmp_path_factory.mktemp("rabbit"))
    node.start()
    yield node
    node.kill()


@pytest.fixture(scope="session")
def redis_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisNode]:
    """A Redis. Tests that stop or hurt it start one of their own."""
    node = RedisNode(tmp_path_factory.mktemp("redis"))
    node.start()
    yield node
    node.kill()


@pytest.fixture
def amqp_url(rabbit_node: RabbitNode) -> Iterator[str]:
    """The URL of a virtual host that only this test has."""
    vhost = f"test-{uuid.uuid4().hex[:12]}"
    yield rabbit_node.create_vhost(vhost)
    rabbit_node.delete_vhost(vhost)


@pytest.fixture(params=["memory", pytest.param("amqp", marks=pytest.mark.services)])
def both_brokers(request: pytest.FixtureRequest) -> Callable[[str], AmqpBroker] | None:
    """Runs a test twice: with None, for the broker in memory, and with what opens a connection to
    RabbitMQ under a name."""
    if request.param == "memory":
        return None
    url = request.getfixturevalue("amqp_url")
    return lambda name: AmqpBroker(url, name)


@pytest.fixture
def redis_url(redis_node: RedisNode) -> str:
    """The URL of a Redis that is empty when the test begins."""
    redis_node.flush()
    return redis_node.url
