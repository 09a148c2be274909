"""Limits of queues, set by policy."""

from __future__ import annotations

import re

import pytest

from roost.local.rabbit import RabbitNode
from shared import names
from shared.broker.policies import POLICIES, apply_policies, vhost_of
from shared.errors import Unavailable


@pytest.mark.parametrize(
    ("url", "vhost"),
    [
        ("amqp://guest:guest@localhost", "/"),
        ("amqp://guest:guest@localhost:5672/", "/"),
        ("amqp://guest@localhost/%2F", "/"),
        ("amqps://u:p%40@host/models?heartbeat=5", "models"),
        ("amqp://host/a%2Fb%20c", "a/b c"),
    ],
)
def test_vhost_of(url: str, vhost: str) -> None:
    """The virtual host is the URL's path, unescaped; none means the default one."""
    assert vhost_of(url) == vhost


@pytest.mark.parametrize(
    ("queue", "policies"),
    [
        (names.model_queue(names.model_id("bert", 1)), ["roost-models"]),
        (names.UNROUTED, ["roost-unrouted"]),
        (names.DEAD, ["roost-dead"]),
        (names.REPLY_QUEUE_PREFIX + "gw-1", []),
        (names.JOB_QUEUE_PREFIX + "0", ["roost-jobs"]),
        ("roost_model.bert.1", []),
        ("roost.dead2", []),
    ],
)
def test_each_queue_has_its_policy(queue: str, policies: list[str]) -> None:
    """RabbitMQ applies one policy to a queue, so no two may match the same."""
    assert [each.name for each in POLICIES if re.search(each.pattern, queue)] == policies


def test_unreachable_api() -> None:
    """It is an error of ours, and does not show the password."""
    with pytest.raises(Unavailable) as raised:
        apply_policies("http://guest:secret@127.0.0.1:9")
    assert "secret" not in str(raised.value)


def test_policies_take_effect(rabbit_node: RabbitNode, amqp_url: str) -> None:
    """The broker lists them for the virtual host; setting them again changes nothing."""
    vhost = vhost_of(amqp_url)
    apply_policies(rabbit_node.management_url, vhost)
    apply_policies(rabbit_node.management_url, vhost)
    listed = rabbit_node.api("GET", f"/api/policies/{vhost}").decode()
    assert listed.count('"name"') == len(POLICIES)
    assert '"overflow":"reject-publish"' in listed
    refused = rabbit_node.management_url.replace(":guest@", ":secret@")
    with pytest.raises(Unavailable) as raised:
        apply_policies(refused, vhost)
    assert "secret" not in str(raised.value)
