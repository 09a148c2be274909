"""One request to a gateway, as data."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

import httpx
import msgspec
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, int], None]
"""Told bytes sent so far, and bytes in all."""
Outputs = Sequence[str] | None
Split = Mapping[int, int]
"""Weights by version."""
Item = dict[str, Any]
Items = list[Item]
Ids = list[str]
Content = bytes | Iterable[bytes] | AsyncIterable[bytes] | None

T = TypeVar("T")

_GRACE_S: Final = 5.0
"""How much longer than the request's own deadline the client waits for the answer."""
TIMEOUT: Final = httpx.Timeout(60.0)
UPLOAD_TIMEOUT: Final = httpx.Timeout(60.0, read=600.0)


class Call(msgspec.Struct, Generic[T], frozen=True):
    """What is sent, and how what comes back is read."""

    method: str
    url: str
    read: Callable[[httpx.Response], T]
    """Raises `RoostError` for what is no success."""
    content: Content = None
    headers: Mapping[str, str] = {}
    timeout: httpx.Timeout = TIMEOUT
    again: bool = False
    """Whether it is sent a second time when the connection was lost before an answer came: only
    where sending twice comes to the same as sending once."""

    def request(self) -> dict[str, Any]:
        """What `httpx.Client.request` takes."""
        return {
            "method": self.method,
            "url": self.url,
            "content": self.content,
            "headers": self.headers,
            "timeout": self.timeout,
        }


def timeout_of(timeout_s: float | None) -> httpx.Timeout:
    # Without a deadline of its own a request has the server's default, which the client does
    # not know; the server always answers in the end.
    return httpx.Timeout(10.0, read=None if timeout_s is None else timeout_s + _GRACE_S)
