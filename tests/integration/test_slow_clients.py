"""Clients that take their time, on purpose: on the real ports of a gateway and a placer.

What shared/http/ does of itself is tested in tests/unit/http/, the worker's port in
tests/unit/worker/test_http.py."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import grpc.aio
import pytest

from services.gateway.grpc import inference_pb2 as pb
from services.gateway.grpc import server
from shared.http import protocol
from tests.gateway_rig import running

DEADLINE_S = 30.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
HALF_HEADERS = b"\0\0\1\1\0\0\0\0\1\x83"
"""A HEADERS frame of stream 1 that more is to follow, and nothing does."""


@contextlib.asynccontextmanager
async def connected(port: int, said: bytes):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    try:
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def ended(reader: asyncio.StreamReader) -> None:
    """The other side closes the connection, whatever it says before."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(DEADLINE_S):
            while await reader.read(4096):
                pass


@pytest.mark.parametrize("said", [b"", PREFACE, PREFACE[:5]])
async def test_a_grpc_handshake_that_does_not_end_is_cut_off(tmp_path, monkeypatch, said):
    """The connection that says nothing, or not enough, makes room."""
    monkeypatch.setattr(server, "HANDSHAKE_TIMEOUT_S", 0.3)
    async with running(tmp_path, grpc_port=0) as rig, connected(rig.grpc_port, said) as reader:
        await ended(reader)


@pytest.mark.parametrize("said", [b"", HALF_HEADERS])
async def test_a_grpc_connection_without_calls_is_cut_off(tmp_path, monkeypatch, said):
    """Headers that never end are no call."""
    monkeypatch.setattr(server, "IDLE_S", 0.3)
    async with (
        running(tmp_path, grpc_port=0) as rig,
        connected(rig.grpc_port, PREFACE + SETTINGS + said) as reader,
    ):
        await ended(reader)


async def test_huge_grpc_metadata_are_refused_unread(tmp_path):
    """The call costs its client an error, and others nothing."""
    async with (
        running(tmp_path, grpc_port=0) as rig,
        grpc.aio.insecure_channel(f"127.0.0.1:{rig.grpc_port}") as channel,
    ):
        live = channel.unary_unary(
            "/inference.GRPCInferenceService/ServerLive",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=pb.ServerLiveResponse.FromString,
        )
        huge = (("x", "y" * (2 * server.METADATA_BYTES)),)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await live(pb.ServerLiveRequest(), metadata=huge, timeout=DEADLINE_S)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await live(pb.ServerLiveRequest(), timeout=DEADLINE_S)).live


async def test_a_gateway_cuts_off_heads_that_drip_and_heads_without_end(tmp_path, monkeypatch):
    """And serves others meanwhile."""
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.3)
    async with running(tmp_path) as rig:
        async with connected(rig.port, b"GET /v2 HTTP/1.1\r\nX: ") as slow:
            assert (await rig.infer()).status_code == 200
            await ended(slow)
        async with connected(rig.port, b"GET /v2 HTTP/1.1\r\n" + b"X: y\r\n" * 20_000) as huge:
            async with asyncio.timeout(DEADLINE_S):
                assert (await huge.read(12)) == b"HTTP/1.1 400"
            await ended(huge)


async def test_a_body_that_drips_is_answered_and_cut_off(tmp_path):
    """One time for the whole body."""
    async with running(tmp_path, body_timeout_s=0.3) as rig:
        head = b"POST /v2/models/adder/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
        async with connected(rig.port, head) as reader, asyncio.timeout(DEADLINE_S):
            assert await reader.read(12) == b"HTTP/1.1 408"
            await ended(reader)
