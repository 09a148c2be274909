"""What one connection may bring and take, and in what time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import httpx
import pytest

from shared.http import protocol
from tests.http_rig import LARGE, served, talk


@pytest.mark.parametrize("begin", [b"", b"GET /hello HT", b"GET /hello HTTP/1.1\r\nHost: x\r\n"])
async def test_a_head_must_come_in_time(begin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that says nothing, or half a head, is dropped."""
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    async with served() as server:
        with contextlib.suppress(ConnectionResetError):
            assert await talk(server.port, begin) == b""


async def test_dripping_bytes_do_not_prolong_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is absolute: another header every moment does not help."""
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.3)
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
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
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
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.3)
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
    monkeypatch.setattr(protocol, "SEND_TIMEOUT_S", 0.3)
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
    monkeypatch.setattr(protocol, "SEND_TIMEOUT_S", 2.0)
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


async def connect_slowly(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection with little room for what is not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=sock, limit=1024)


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
