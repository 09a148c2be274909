"""A small application behind the HTTP server, and a client that says any bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from shared.http import serve


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

    app = Starlette(
        routes=[
            Route("/hello", hello, methods=["GET", "POST"]),
            Route("/large", large),
            Route("/refuse", refuse, methods=["POST"]),
            Route("/wait", wait),
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
