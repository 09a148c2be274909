"""A call, as far as this gateway uses what gRPC hands to a method (it has no types)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol


def metadata_of(context: Context) -> dict[bytes, bytes]:
    """The call's metadata, as HTTP has its headers."""
    return {
        key.encode(): value if isinstance(value, bytes) else value.encode("latin-1", "replace")
        for key, value in context.invocation_metadata() or ()
    }


class Context(Protocol):
    """Of `grpc.aio.ServicerContext`."""

    async def read(self) -> Any:
        """The next message, as bytes; something else at the end."""

    async def write(self, message: Any) -> None: ...

    async def abort(
        self, code: Any, details: str = "", trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> NoReturn:
        """Raises `grpc.aio.AbortError`, or `grpc.aio.InternalError` when the call has ended."""

    def time_remaining(self) -> float | None:
        """Seconds to the deadline, at least 0; None when there is none."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None: ...

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Called when the answer is with the client, or the call has ended without."""
