import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import structlog
from prometheus_client import CollectorRegistry, Counter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from shared import http
from shared.http import metrics_route, serve


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"hello {len(await request.body())}")


async def refuse(request: Request) -> PlainTextResponse:
    return PlainTextResponse("too large", status_code=413)


LARGE = 20_000_000


async def large(request: Request) -> PlainTextResponse:
    return PlainTextResponse("x" * LARGE)


class Served:
    """A served app with one route that waits until it is released."""

    def __init__(self, port: int, task: asyncio.Task[None], stop: asyncio.Event) -> None:
        self.port, self.task, self.stop = port, task, stop
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.url = f"http://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def served(**options: Any) -> AsyncIterator[Served]:
    box: list[Served] = []

    async def wait(request: Request) -> PlainTextResponse:
        box[0].entered.set()
        await box[0].release.wait()
        return PlainTextResponse("released")

    registry = CollectorRegistry()
    Counter("roost_things", "Things.", ["model"], registry=registry).labels("m").inc()
    app = Starlette(
        routes=[
            Route("/hello", hello, methods=["GET", "POST"]),
            Route("/large", large),
            Route("/refuse", refuse, methods=["POST"]),
            Route("/wait", wait),
            metrics_route(registry),
        ]
    )
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(app, "127.0.0.1", 0, stop, port.set_result, **options))
    await asyncio.wait({task, port}, return_when=asyncio.FIRST_COMPLETED)
    box.append(Served(port.result(), task, stop))
    try:
        yield box[0]
    finally:
        stop.set()
        box[0].release.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)


async def talk(port: int, *parts: bytes) -> bytes:
    """Sends the parts and reads until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_the_bound_port_is_told_once_it_answers() -> None:
    """Port 0 takes a free one, and on_started comes when connections are taken."""
    async with served() as server, httpx.AsyncClient() as client:
        answer = await client.post(f"{server.url}/hello", content=b"x" * 200_000)
        assert answer.text == "hello 200000"
        assert "server" not in answer.headers


async def test_stop_lets_running_requests_finish_and_takes_no_more() -> None:
    """After stop a request under way gets its answer; a new connection is refused."""
    async with served() as server, httpx.AsyncClient() as client:
        running = asyncio.create_task(client.get(f"{server.url}/wait"))
        await server.entered.wait()
        server.stop.set()
        await until(lambda: refused(server.port))
        server.release.set()
        assert (await running).text == "released"
        await asyncio.wait_for(server.task, 5)


async def test_after_the_grace_running_requests_are_cancelled() -> None:
    """A request that never ends does not keep the service from ending."""
    async with served(grace_s=0.2) as server, httpx.AsyncClient() as client:
        running = asyncio.create_task(client.get(f"{server.url}/wait"))
        await server.entered.wait()
        server.stop.set()
        await asyncio.wait_for(server.task, 10)
        with contextlib.suppress(httpx.HTTPError):  # or the 500 of the cancelled request
            assert (await running).status_code == 500


async def test_cancelled_server_leaves_nothing_behind() -> None:
    """When its service fails, the server gives back its port and its connections at once."""
    async with served() as server, httpx.AsyncClient() as client:
        running = asyncio.create_task(client.get(f"{server.url}/wait"))
        await server.entered.wait()
        server.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await server.task
        with contextlib.suppress(httpx.HTTPError):
            assert (await running).status_code == 500
        assert await refused(server.port)


async def test_a_taken_port_is_an_error() -> None:
    """Not an exit from deep inside: the service decides what it means."""
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        await serve(Starlette(), "127.0.0.1", other.getsockname()[1], asyncio.Event())


async def test_signals_stay_with_the_service() -> None:
    """uvicorn's own handlers are not installed."""
    import signal

    before = signal.getsignal(signal.SIGTERM)
    async with served():
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("begin", [b"", b"GET /hello HT", b"GET /hello HTTP/1.1\r\nHost: x\r\n"])
async def test_a_head_must_come_in_time(begin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that says nothing, or half a head, is dropped."""
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.2)
    async with served() as server:
        with contextlib.suppress(ConnectionResetError):
            assert await talk(server.port, begin) == b""


async def test_dripping_bytes_do_not_prolong_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is absolute: another header every moment does not help."""
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.3)
    async with served() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        gone = asyncio.create_task(reader.read())
        writer.write(b"GET /hello HTTP/1.1\r\n")
        async with asyncio.timeout(5):
            while not gone.done():
                writer.write(b"X: y\r\n")
                await asyncio.wait({gone}, timeout=0.05)
        with contextlib.suppress(ConnectionError):
            assert gone.result() == b""
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_a_waiting_request_and_an_idle_connection_outlive_the_head_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock runs for heads only, not while a request is served or a client is idle."""
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.2)
    async with served() as server, httpx.AsyncClient() as client:
        running = asyncio.create_task(client.get(f"{server.url}/wait"))
        await server.entered.wait()
        await asyncio.sleep(0.4)
        server.release.set()
        assert (await running).text == "released"
        stream = running.result().extensions["network_stream"]
        await asyncio.sleep(0.4)
        again = await client.get(f"{server.url}/hello")
        assert again.text == "hello 0"
        local = "client_addr"
        assert again.extensions["network_stream"].get_extra_info(local) == stream.get_extra_info(
            local
        )


async def test_a_head_has_a_size_limit() -> None:
    """Endless headers end in a 400, whether one is long or there are many."""
    async with served() as server:
        for filler in (b"y" * 70_000, b"\r\n".join([b"X: y"] * 12_000)):
            head = b"GET /hello HTTP/1.1\r\nHost: x\r\nX: "
            parts = [filler[i : i + 1000] for i in range(0, len(filler), 1000)]
            with contextlib.suppress(ConnectionError):
                assert (await talk(server.port, head, *parts)).startswith(b"HTTP/1.1 400 ")


async def test_many_requests_on_one_connection_are_counted_apart() -> None:
    """The limit is per request, and large bodies do not count."""
    request = b"POST /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 30000\r\n\r\n" + b"z" * 30_000
    last = b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    async with served() as server:
        answer = await talk(server.port, *[request] * 10, last)
    assert answer.count(b"HTTP/1.1 200 ") == 11


async def test_an_upgrade_that_is_not_offered_is_an_ordinary_request() -> None:
    """Clients that ask for HTTP/2 on the way (h2c) get their answer over HTTP/1.1."""
    request = (
        b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    )
    async with served() as server:
        assert b"hello 0" in await talk(server.port, request)


async def test_a_refused_body_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an early answer the rest of a body is drained for a while, then cut off."""
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.3)
    async with served() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                while not writer.is_closing():
                    writer.write(b"z" * 1000)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                    if reader.at_eof() or reader.exception():
                        break
                    with contextlib.suppress(TimeoutError):
                        if not await asyncio.wait_for(reader.read(100), 0.01):
                            break
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_a_client_that_does_not_read_its_answer_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One time for the whole answer: reading a little now and then does not prolong it."""
    monkeypatch.setattr(http, "SEND_TIMEOUT_S", 0.3)
    async with served() as server:
        reader, writer = await connect_slowly(server.port)
        writer.write(b"GET /large HTTP/1.1\r\nHost: h\r\n\r\n")
        got, begun = 0, asyncio.get_running_loop().time()
        with contextlib.closing(writer), contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(10):
                while piece := await reader.read(1000):
                    got += len(piece)
                    # Later as fast as can be: what is on its way in the kernel still comes.
                    if asyncio.get_running_loop().time() - begun < 0.6:
                        await asyncio.sleep(0.01)
        assert 0 < got < LARGE


async def test_a_client_that_reads_in_time_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its connection lives on, also when it is idle for longer than an answer may take, or
    the next request, sent along with the first, takes as long."""
    monkeypatch.setattr(http, "SEND_TIMEOUT_S", 2.0)
    async with served() as server, httpx.AsyncClient(trust_env=False) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        get = b"GET /%s HTTP/1.1\r\nHost: h\r\n\r\n"
        writer.write(get % b"large" + get % b"wait")
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(LARGE)
        assert len((await client.get(f"{server.url}/large")).content) == LARGE
        await asyncio.sleep(2.2)
        server.release.set()
        with contextlib.closing(writer):
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        before = next(iter(client._transport._pool.connections))
        assert (await client.get(f"{server.url}/hello")).status_code == 200
        assert next(iter(client._transport._pool.connections)) is before


async def test_answers_do_not_wait_for_acknowledgements() -> None:
    """Connections inherit TCP_NODELAY from the listener."""
    listener = http._listen("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()):
        loop = asyncio.get_running_loop()
        accepted, _ = await loop.sock_accept(listener)
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def connect_slowly(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection with little room for what is not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=sock, limit=1024)


async def test_beyond_max_connections_new_ones_are_closed_at_once() -> None:
    """While all are busy, the connection too many gets nothing; the others are not disturbed."""
    async with served(max_connections=1) as server, httpx.AsyncClient() as client:
        running = asyncio.create_task(client.get(f"{server.url}/wait"))
        await server.entered.wait()
        with structlog.testing.capture_logs() as lines:
            for _ in range(3):
                with contextlib.suppress(ConnectionError):
                    assert await talk(server.port, b"GET /hello HTTP/1.1\r\n\r\n") == b""
        assert [line["event"] for line in lines] == ["connections_refused"], "no flood of lines"
        server.release.set()
        assert (await running).status_code == 200
        again = await client.get(f"{server.url}/hello")
        assert again.status_code == 200, "on the connection that is there already"


async def test_idle_connections_make_way_for_new_ones() -> None:
    """Whoever keeps every connection open and says nothing shuts nobody out: the one that was
    idle for longest goes, the others stay usable."""
    request = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
    async with served(max_connections=3) as server:
        silent = await asyncio.open_connection("127.0.0.1", server.port)
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        for reader, writer in reversed(idle):
            writer.write(request)
            assert b"hello 0" in await reader.readuntil(b"hello 0")
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{server.url}/hello")).text == "hello 0"
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(silent[0].read(), 5) == b""
        for reader, writer in idle:
            writer.write(request)
            assert b"hello 0" in await reader.readuntil(b"hello 0")
        for _, writer in (silent, *idle):
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def test_beyond_max_requests_clients_are_told() -> None:
    """Requests under way are bounded apart from connections; the answer is JSON."""
    async with served(max_requests=1) as server, httpx.AsyncClient() as client:
        running = asyncio.create_task(client.get(f"{server.url}/wait"))
        await server.entered.wait()
        answer = await client.get(f"{server.url}/hello")
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == {"error": "too many requests are under way"}
        server.release.set()
        assert (await running).status_code == 200
        assert (await client.get(f"{server.url}/hello")).status_code == 200


async def test_what_is_not_http_is_told_so_as_json() -> None:
    """The server's own 400 has the form of all errors."""
    async with served() as server:
        head, _, body = (await talk(server.port, b"\x16\x03\x01 nonsense\r\n\r\n")).partition(
            b"\r\n\r\n"
        )
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    assert json.loads(body) == {"error": "Invalid HTTP request received."}


async def test_metrics_come_in_the_form_that_is_asked_for() -> None:
    """Prometheus text by default, OpenMetrics on request."""
    async with served() as server, httpx.AsyncClient() as client:
        plain = await client.get(f"{server.url}/metrics", headers={"accept": "text/plain"})
        assert 'roost_things_total{model="m"} 1.0' in plain.text
        assert plain.headers["content-type"].startswith("text/plain")
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        openmetrics = await client.get(f"{server.url}/metrics", headers=accept)
        assert openmetrics.text.endswith("# EOF\n")
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")


async def refused(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return True
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return False


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


def test_a_low_limit_of_open_files_is_raised():
    """As far as the process may, and no further; what is possible then is told."""
    script = """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 2000))
from shared.http import _openable
print(_openable(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0], _openable(5000))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.splitlines()[-1].split() == ["1000", "1256", "1744"]
