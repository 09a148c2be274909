"""Private RabbitMQ and Redis nodes, as tests, benchmarks and `roost up` start them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pika
import pytest
import redis

import roost.local
from roost.local import MissingService, ServiceFailed, find_binaries
from roost.local.ports import free_ports
from roost.local.process import OwnedProcess, tail
from roost.local.rabbit import RabbitNode
from roost.local.redis import RedisNode

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_rabbit(tmp_path: Path) -> Iterator[RabbitNode]:
    """A bare node that the test may hurt. Not started."""
    node = RabbitNode(tmp_path / "rabbit", management=False)
    yield node
    node.kill()


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether it runs. One that ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def test_every_test_has_a_virtual_host_of_its_own(amqp_url: str, rabbit_node: RabbitNode) -> None:
    """What one test declares no other test sees, and nothing stays behind."""
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        connection.channel().queue_declare("q", durable=True)
    queues = json.loads(rabbit_node.api("GET", "/api/queues"))
    assert [queue["vhost"] for queue in queues] == [amqp_url.rpartition("/")[2]]
    second = rabbit_node.create_vhost("a/b")
    with pika.BlockingConnection(pika.URLParameters(second)) as connection:
        assert connection.is_open
    rabbit_node.delete_vhost("a/b")
    vhosts = {vhost["name"] for vhost in json.loads(rabbit_node.api("GET", "/api/vhosts"))}
    assert vhosts == {"/", amqp_url.rpartition("/")[2]}


def test_depths_can_be_read_from_prometheus(rabbit_node: RabbitNode, amqp_url: str) -> None:
    """A node with management has the endpoint that tells all queues' depths in one go."""
    url = f"{rabbit_node.prometheus_url}/metrics/detailed?family=queue_coarse_metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert b"rabbitmq" in answer.read()


@pytest.mark.services
def test_redis_is_empty_after_a_kill_and_has_the_same_port(tmp_path: Path) -> None:
    """A killed Redis comes back where it was and knows nothing."""
    node = RedisNode(tmp_path)
    node.start()
    try:
        url = node.url
        with redis.Redis.from_url(url) as client:
            client.set("key", "value")
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        node.kill()
        assert not node.running
        node.start()
        assert node.url == url
        with redis.Redis.from_url(url) as client:
            assert client.dbsize() == 0
    finally:
        node.stop()
    assert not listening(node.port)


def test_redis_is_empty_when_a_test_begins(redis_url: str) -> None:
    """The first of two tests that would fail if content were passed on."""
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left", "behind")


def test_redis_is_empty_when_the_next_test_begins(redis_url: str) -> None:
    """The second of the two."""
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0


@pytest.mark.services
def test_confirmed_messages_outlive_a_killed_broker(own_rabbit: RabbitNode) -> None:
    """kill() and start() give the same node on the same port, with its durable content; stop()
    leaves neither broker nor epmd."""
    own_rabbit.start()
    url, epmd_port = own_rabbit.amqp_url, own_rabbit._epmd_port
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare("q", durable=True)
        channel.basic_publish("", "q", b"kept", pika.BasicProperties(delivery_mode=2))
    own_rabbit.kill()
    own_rabbit.start()
    assert own_rabbit.amqp_url == url
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        _, _, body = connection.channel().basic_get("q", auto_ack=True)
    assert body == b"kept"
    assert "guest" in own_rabbit.ctl("list_users")
    with pytest.raises(ServiceFailed, match="rabbitmqctl"):
        own_rabbit.ctl("no_such_command")
    pid = own_rabbit.pid
    assert pid is not None
    own_rabbit.stop()
    assert not alive(pid)
    assert not listening(own_rabbit.port)
    assert not listening(epmd_port)


@pytest.mark.services
def test_two_nodes_do_not_disturb_each_other(
    own_rabbit: RabbitNode, rabbit_node: RabbitNode
) -> None:
    """The end of one, by any way, leaves the other as it was. A paused one answers nobody."""
    own_rabbit.start()
    own_rabbit.pause()
    assert not own_rabbit._answers()
    own_rabbit.resume()
    until(own_rabbit._answers)
    own_rabbit.kill()
    assert rabbit_node._answers()


@pytest.mark.services
def test_a_broker_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The error ends with what the broker wrote, and nothing is left running."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        node = RabbitNode(tmp_path, other.getsockname()[1], management=False)
        with pytest.raises(ServiceFailed, match=r"(?s)rabbitmq-server ended.*eaddrinuse"):
            node.start()
    assert not node.running
    assert not listening(node._epmd_port)


ORPHANS = """
import sys, threading
from roost.local.redis import RedisNode
from roost.local.rabbit import RabbitNode
nodes = [RedisNode(sys.argv[1] + "/redis"), RabbitNode(sys.argv[1] + "/rabbit", management=False)]
starter = threading.Thread(target=lambda: [node.start() for node in nodes])
starter.start()
starter.join()
print(nodes[0]._process.pid, nodes[1].pid, nodes[1]._epmd.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.services
def test_services_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """They live on when the thread that started them ends, and end when the process is
    killed."""
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        assert all(alive(pid) for pid in pids)
        parent.kill()
    until(lambda: not any(alive(pid) for pid in pids))


def test_what_is_missing_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The line names what to install, and the way without it."""
    for folders in ("_RABBITMQ_FOLDERS", "_ERLANG_FOLDERS", "_COMMON_FOLDERS"):
        monkeypatch.setattr(roost.local, folders, ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingService) as caught:
        find_binaries()
    message = str(caught.value)
    assert "apt-get install rabbitmq-server redis-server" in message
    assert "--embedded" in message
    assert "EMBEDDED=1" in message
    assert "\n" not in message


def test_free_ports_are_different_and_out_of_the_kernels_own_range() -> None:
    """No outgoing connection can take one of them."""
    ports = free_ports(50)
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert len(set(ports)) == 50
    assert not [port for port in ports if low <= port <= high]


def owned(tmp_path: Path, code: str) -> OwnedProcess:
    return OwnedProcess(
        "demo",
        [sys.executable, "-c", code],
        env=dict(os.environ),
        cwd=tmp_path,
        output=tmp_path / "out.log",
    )


def test_a_process_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    """stop() waits as long as it was told, then kills; a second stop does nothing."""
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('up', flush=True); time.sleep(600)"
    )
    process = owned(tmp_path, code)
    process.wait_ready(lambda: "up" in tail(process.output), 20)
    process.stop(0.2)
    assert process.returncode == -signal.SIGKILL
    process.stop(0.2)


def test_a_process_that_ends_early_is_told_apart_from_a_slow_one(tmp_path: Path) -> None:
    """Waiting for a dead process fails at once; for a mute one, when the time is over."""
    dead = owned(tmp_path, "raise SystemExit(3)")
    with pytest.raises(ServiceFailed, match="demo ended with status 3"):
        dead.wait_ready(lambda: False, 20)
    mute = owned(tmp_path, "import time; time.sleep(600)")
    try:
        with pytest.raises(ServiceFailed, match="not ready within 0 s"):
            mute.wait_ready(lambda: False, 0.1)
    finally:
        mute.kill()
