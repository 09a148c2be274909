"""A server of the test's own, whose connections are all over when it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def served(serve: Serve) -> AsyncIterator[str]:
    """Its URL. `serve` is called for each connection, which is closed when it returns; it is to
    return when the client has gone. Clients are closed before this ends."""
    async with asyncio.TaskGroup() as connections:

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.create_task(connected(reader, writer))

        async with await asyncio.start_server(accepted, "127.0.0.1", 0) as server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
