"""The proxy of the fault harness does to connections what networks do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import cast

import numpy as np
import pytest

from benchmarks.proxy import Proxy
from roost.local.ports import LOOPBACK

pytestmark = pytest.mark.timeout(60)


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


@contextlib.asynccontextmanager
async def proxied() -> AsyncIterator[Proxy]:
    """A proxy before a server that sends back what it hears."""

    server = await asyncio.get_running_loop().create_server(Echo, LOOPBACK, 0)
    proxy = Proxy(np.random.default_rng(0))
    proxy.target_port = server.sockets[0].getsockname()[1]
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
        server.close()


@contextlib.asynccontextmanager
async def connected(
    proxy: Proxy,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(LOOPBACK, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    async with asyncio.timeout(20):
        return await reader.readexactly(len(data))


async def test_what_is_large_passes_whole_and_in_order_through_latency_and_loss():
    """Pieces are delayed one by one, and none overtakes another."""
    data = np.random.default_rng(1).bytes(3 << 20)
    async with proxied() as proxy, connected(proxy) as (reader, writer):
        assert await said(reader, writer, data) == data
        proxy.latency_s, proxy.loss = 0.02, 0.2
        began = asyncio.get_running_loop().time()
        assert await said(reader, writer, data) == data
        assert asyncio.get_running_loop().time() - began >= 2 * 0.02


async def test_a_stopped_link_says_nothing_and_then_everything():
    """What waited comes once the link goes on; a connection made meanwhile is silent as well."""
    async with proxied() as proxy, connected(proxy) as (reader, writer):
        await said(reader, writer, b"before")
        proxy.stop()
        async with connected(proxy) as (late, late_writer):
            writer.write(b"while")
            late_writer.write(b"later")
            hearing = [asyncio.ensure_future(each.readexactly(5)) for each in (reader, late)]
            heard, _ = await asyncio.wait(hearing, timeout=0.5)
            assert not heard
            proxy.go_on()
            async with asyncio.timeout(20):
                assert await asyncio.gather(*hearing) == [b"while", b"later"]


async def test_a_half_open_connection_hears_nothing_and_a_new_one_is_well():
    """Neither an answer nor an end comes through a forgotten connection."""
    async with proxied() as proxy, connected(proxy) as (reader, writer):
        await said(reader, writer, b"before")
        assert proxy.forget() == 1
        writer.write(b"into the void")
        async with connected(proxy) as new:
            assert await said(*new, b"well") == b"well"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await reader.read(1)


async def test_a_cut_connection_ends_at_once():
    """Its ends see a reset, or an end."""
    async with proxied() as proxy, connected(proxy) as (reader, writer):
        await said(reader, writer, b"before")
        proxy.cut()
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                assert await reader.read(1) == b""
