"""Does calls: the one place that differs between the two clients."""

from __future__ import annotations

import asyncio
import os
import re
import time
from typing import Any, Final, Self

import httpx

from roost.calls.answers import no_answer
from roost.calls.call import TIMEOUT, Call, T
from roost.calls.waiting import Wait
from roost.trust import verify
from shared.errors import InvalidRequest, RoostError
from shared.keys import TOKEN

_LOST: Final = (httpx.NetworkError, httpx.RemoteProtocolError)
"""The connection, not the time."""
_FAILED: Final = (httpx.HTTPError, httpx.InvalidURL)


def authorization(api_key: str | None = None) -> dict[str, str]:
    """The header that shows an API key; None: that of `ROOST_API_KEY`, if any. Raises
    `InvalidRequest`, without the key, for what cannot be one."""
    key = (os.environ.get("ROOST_API_KEY", "") if api_key is None else api_key).strip()
    if not key:
        return {}
    if not re.fullmatch(TOKEN, key):
        raise InvalidRequest("the API key is not one: they look like rk_<12 digits>_<64 digits>")
    return {"authorization": f"Bearer {key}"}


def options_of(
    url: str,
    api_key: str | None = None,
    ca_file: str | None = None,
    cert_file: str | None = None,
    key_file: str | None = None,
) -> dict[str, Any]:
    """What both of httpx's clients take."""
    return {
        "timeout": TIMEOUT,
        "trust_env": False,
        "verify": verify(url, ca_file, cert_file, key_file),
        "headers": authorization(api_key),
    }


class Sender:
    """A connection pool to one gateway. `options`: as of `options_of`, which is what is taken
    without any."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.Client(**(options_of(url) if options is None else options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def do(self, call: Call[T]) -> T:
        """Raises `RoostError`; `Unavailable` when no answer came."""
        try:
            try:
                answer = self._http.request(**call.request())
            except _LOST:
                if not call.again:
                    raise
                answer = self._http.request(**call.request())
        except _FAILED as error:
            raise no_answer(self._url, error) from error
        return call.read(answer)

    def wait(self, call: Call[T], wait_s: float | None) -> T:
        """For a job's result: does the call until the job has ended, or the time is over."""
        wait = Wait(wait_s, time.monotonic())
        while True:
            try:
                return self.do(call)
            except RoostError as error:
                pause_s = wait.pause_s(error, time.monotonic())
            time.sleep(pause_s)


class AsyncSender:
    """`Sender` for asyncio."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.AsyncClient(**(options_of(url) if options is None else options))

    async def close(self) -> None:
        await self._http.aclose()

    async def do(self, call: Call[T]) -> T:
        """See `Sender.do`."""
        try:
            try:
                answer = await self._http.request(**call.request())
            except _LOST:
                if not call.again:
                    raise
                answer = await self._http.request(**call.request())
        except _FAILED as error:
            raise no_answer(self._url, error) from error
        return call.read(answer)

    async def wait(self, call: Call[T], wait_s: float | None) -> T:
        """See `Sender.wait`."""
        wait = Wait(wait_s, time.monotonic())
        while True:
            try:
                return await self.do(call)
            except RoostError as error:
                pause_s = wait.pause_s(error, time.monotonic())
            await asyncio.sleep(pause_s)
