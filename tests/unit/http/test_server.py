"""The server's begin and end, and what it listens on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.applications import Starlette

from shared.http import serve
from shared.http.server import _listen
from tests.http_rig import served


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


async def test_answers_do_not_wait_for_acknowledgements() -> None:
    """Connections inherit TCP_NODELAY from the listener."""
    listener = _listen("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()):
        loop = asyncio.get_running_loop()
        accepted, _ = await loop.sock_accept(listener)
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


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
