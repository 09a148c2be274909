"""TLS before the HTTP server: on both event loops, as a client and an attacker see it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest
import structlog
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from roost.trust import why
from shared.http import handshake, serve
from shared.tls import ServerTls, explain
from tests.authority import Authority

Test = Callable[[Path], Awaitable[None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def on_loop(request) -> Callable[[Awaitable[None]], None]:
    """Runs a coroutine: services use uvloop, tests asyncio, and their TLS is not the same code."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(work):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(work)

    return run


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{request.url.scheme} {len(await request.body())}")


@contextlib.asynccontextmanager
async def served(tls: ServerTls, **options: int) -> AsyncIterator[str]:
    app = Starlette(routes=[Route("/hello", hello, methods=["GET", "POST"])])
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(
        serve(app, "127.0.0.1", 0, stop, port.set_result, tls=tls, **options)
    )
    await asyncio.wait({server, port}, return_when=asyncio.FIRST_COMPLETED)
    try:
        yield f"https://localhost:{port.result()}"
    finally:
        stop.set()
        await asyncio.wait_for(server, 20)


def client(trusting: Authority, name: str = "") -> httpx.AsyncClient:
    return httpx.AsyncClient(verify=trusting.client(name).context(), trust_env=False, timeout=20)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


async def serial_of(url: str, trusting: Authority) -> str:
    """Of the certificate that a new connection is shown."""
    context = trusting.client().context()
    _, writer = await asyncio.open_connection("localhost", port_of(url), ssl=context)
    serial = writer.get_extra_info("peercert")["serialNumber"]
    writer.transport.abort()
    return serial


def test_requests_travel_encrypted(on_loop, tmp_path):
    """Bodies larger than a record, and several requests on one connection."""

    async def test():
        authority = Authority(tmp_path)
        async with served(authority.server()) as url, client(authority) as asks:
            assert (await asks.get(f"{url}/hello")).text == "https 0"
            answer = await asks.post(f"{url}/hello", content=b"x" * 200_000)
            assert answer.text == "https 200000"

    on_loop(test())


def test_a_stranger_s_certificate_and_another_name_are_refused_by_the_client(on_loop, tmp_path):
    """The client's one line says why."""

    async def test():
        authority = Authority(tmp_path)
        async with served(authority.server("server", "roost.test")) as url:
            for trusting, said in (
                (Authority(tmp_path, "other"), "unable to get local issuer certificate"),
                (authority, "Hostname mismatch, certificate is not valid for 'localhost'."),
            ):
                async with client(trusting) as asks:
                    with pytest.raises(httpx.ConnectError) as caught:
                        await asks.get(f"{url}/hello")
                assert why(url, caught.value) == f"its certificate is refused: {said}"

    on_loop(test())


def test_clients_need_a_certificate_where_that_is_set(on_loop, tmp_path):
    """None, and one of another authority, get no answer; one of ours does."""

    async def test():
        authority, stranger = Authority(tmp_path), Authority(tmp_path, "other")
        async with served(authority.server(clients=authority.ca_file)) as url:
            async with client(authority, "friend") as asks:
                assert (await asks.get(f"{url}/hello")).text == "https 0"
            for cert in ((), stranger.issue("stranger", "client.test")):
                context = authority.client().context()
                if cert:
                    context.load_cert_chain(*cert)
                async with httpx.AsyncClient(verify=context, trust_env=False) as asks:
                    # TLS 1.3: the client has finished before the server looks at it.
                    with pytest.raises(httpx.TransportError) as caught:
                        await asks.get(f"{url}/hello")
                said = why(url, caught.value)
                assert "client certificate" in said, said

    on_loop(test())


def test_a_renewed_certificate_is_shown_to_the_next_connection(on_loop, tmp_path):
    """The one that is open goes on with requests; nothing is restarted."""

    async def test():
        authority = Authority(tmp_path)
        files = authority.server()
        async with served(files) as url, client(authority) as asks:
            first = await serial_of(url, authority)
            await asks.get(f"{url}/hello")
            assert await serial_of(url, authority) == first
            authority.issue("server")
            assert await serial_of(url, authority) != first
            assert (await asks.get(f"{url}/hello")).text == "https 0"

    on_loop(test())


def test_whom_clients_must_be_signed_by_is_renewed_too(on_loop, tmp_path):
    """The authority of the clients is replaced: the old one's are refused from then on."""

    async def test():
        authority, next_one = Authority(tmp_path), Authority(tmp_path, "next")
        accepted = tmp_path / "accepted.pem"
        shutil.copy(authority.ca_file, accepted)
        async with served(authority.server(clients=str(accepted))) as url:
            context = authority.client("old").context()
            newer = authority.client().context()
            newer.load_cert_chain(*next_one.issue("new", "client.test"))

            async def may_ask(context: ssl.SSLContext) -> bool:
                async with httpx.AsyncClient(verify=context, trust_env=False) as asks:
                    try:
                        return (await asks.get(f"{url}/hello")).is_success
                    except httpx.TransportError:
                        return False

            assert await may_ask(context)
            assert not await may_ask(newer)
            shutil.copy(next_one.ca_file, accepted)
            assert await may_ask(newer)
            assert not await may_ask(context)

    on_loop(test())


def test_plain_http_is_told_which_scheme_to_use(on_loop, tmp_path):
    """In plain text, since that is what its sender reads; the log knows too."""

    async def test():
        authority = Authority(tmp_path)
        async with served(authority.server()) as url:
            with structlog.testing.capture_logs() as logs:
                async with httpx.AsyncClient(trust_env=False) as asks:
                    answer = await asks.get(f"{url.replace('https:', 'http:')}/hello")
            assert answer.status_code == 400
            assert answer.json() == {"error": "TLS is spoken here: the URL begins with https://"}
            assert [each["event"] for each in logs] == ["tls_handshakes_failed"]

    on_loop(test())


def test_a_hello_in_many_pieces_is_put_together(on_loop, tmp_path):
    """As a slow network would bring it."""

    async def test():
        authority = Authority(tmp_path)
        async with served(authority.server()) as url:
            to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
            side = (
                authority.client()
                .context()
                .wrap_bio(to_client, to_server, server_hostname="localhost")
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
            pieces = 0
            while True:
                try:
                    side.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    for byte in to_server.read():
                        writer.write(bytes([byte]))
                        await writer.drain()
                        pieces += 1
                    to_client.write(await reader.read(65536))
            side.write(b"GET /hello HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            writer.write(to_server.read())
            answer = b""
            while b"https 0" not in answer:
                to_client.write(await reader.read(65536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    answer += side.read()
            assert answer.startswith(b"HTTP/1.1 200")
            assert pieces > 100
            writer.transport.abort()

    on_loop(test())


def test_old_versions_are_refused(on_loop, tmp_path):
    """TLS 1.1 is no TLS any more."""

    async def test():
        authority = Authority(tmp_path)
        async with served(authority.server()) as url:
            context = authority.client().context()
            with pytest.warns(DeprecationWarning, match="TLSv1_1"):
                context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises(OSError) as caught:
                await asyncio.open_connection("localhost", port_of(url), ssl=context)
            assert explain(caught.value)

    on_loop(test())


def test_silent_connections_neither_stay_nor_keep_others_out(on_loop, tmp_path, monkeypatch):
    """Handshakes that are never begun count as open connections: the longest idle makes room;
    those that are left are closed in time."""

    async def test():
        authority = Authority(tmp_path)
        async with served(authority.server(), max_connections=4) as url:
            silent = [await asyncio.open_connection("127.0.0.1", port_of(url)) for _ in range(6)]
            async with client(authority) as asks:
                assert (await asks.get(f"{url}/hello")).is_success
            monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.2)
            late = await asyncio.open_connection("127.0.0.1", port_of(url))
            assert await asyncio.wait_for(late[0].read(), 20) == b""
            for reader, _ in silent[:3]:
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.wait_for(reader.read(), 20) == b""
            for _, writer in (*silent, late):
                writer.close()

    on_loop(test())


def test_a_server_ends_while_handshakes_are_under_way(on_loop, tmp_path):
    """It does not wait for those who say nothing."""

    async def test():
        authority = Authority(tmp_path)
        with socket.socket() as silent:
            async with asyncio.timeout(8):  # below the time that a handshake has
                async with served(authority.server()) as url:
                    silent.connect(("127.0.0.1", port_of(url)))
                    await serial_of(url, authority)  # the silent one came before

    on_loop(test())
