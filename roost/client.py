"""A small Python client: register models, list them, ask them.

    with RoostClient("http://127.0.0.1:8000") as roost:
        roost.push("adder", "adder.pt")
        outputs = roost.infer("adder", {"x": np.ones((1, 3), np.float32)})

`AsyncRoostClient` has the same methods as coroutines. Every refusal is raised as one of
`shared.errors`; no answer at all is `Unavailable`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import httpx
import msgspec
import numpy as np

from shared import v2
from shared.aliases import check_address, check_alias
from shared.errors import STATUS, InvalidRequest, RoostError, Unavailable, from_code
from shared.models import Manifest, ModelSpec
from shared.names import HEADER_CODE, HEADER_LENGTH, check_name, check_version
from shared.tensors import from_numpy, to_numpy

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, int], None]
"""Told bytes sent so far, and bytes in all."""
Outputs = Sequence[str] | None
Split = Mapping[int, int]
"""Weights by version."""
Items = list[dict[str, Any]]
Ids = list[str]

_PIECE: Final = 1024 * 1024
_GRACE_S: Final = 5.0
"""How much longer than the request's own deadline the client waits for the answer."""
_UPLOAD_TIMEOUT: Final = httpx.Timeout(60.0, read=600.0)
_CODES: Final = {status: code for code, status in STATUS.items()} | {500: "internal"}


def translate_error(answer: httpx.Response) -> RoostError:
    """The exception for an answer that is no success."""
    message = v2.error_message(answer.content) or f"HTTP {answer.status_code}"
    code = answer.headers.get(HEADER_CODE) or _CODES.get(answer.status_code, "internal")
    error = from_code(code, message)
    retry_after = answer.headers.get("retry-after", "")
    if retry_after.isdigit():
        error.retry_after_s = float(retry_after)
    return error


class _Calls:
    """What both clients share: how requests are made and answers are read."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def model(self, name: str, version: int | str | None = None) -> str:
        path = f"{self.url}/v2/models/{quote(check_name(name))}"
        return path if version is None else f"{path}/versions/{check_address(version)}"

    def stored(self, name: str, version: int | str | None = None) -> str:
        path = f"{self.url}/v2/repository/models/{quote(check_name(name))}"
        return path if version is None else f"{path}/versions/{check_version(version)}"

    def alias(self, name: str, alias: str | None = None) -> str:
        path = f"{self.stored(name)}/aliases"
        return path if alias is None else f"{path}/{check_alias(alias)}"

    def quarantine(self, name: str | None = None, version: int | str | None = None) -> str:
        where = f"{self.url}/v2/repository" if name is None else self.stored(name, version)
        return f"{where}/quarantine"

    def blob(self, digest: str) -> str:
        return f"{self.url}/v2/repository/blobs/{digest}"

    def index(self) -> str:
        return f"{self.url}/v2/repository/index"

    def register(
        self, name: str, version: int | str | None, digest: str, spec: ModelSpec | None
    ) -> tuple[str, str, bytes]:
        """Method, URL and body of the registration."""
        body = msgspec.json.encode({"digest": digest, "spec": spec or ModelSpec()})
        if version is None:
            return "POST", f"{self.stored(name)}/versions", body
        return "PUT", self.stored(name, version), body

    def infer(
        self, inputs: Mapping[str, Array], timeout_s: float | None, outputs: Outputs
    ) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a request; all tensors travel as raw bytes."""
        request = v2.InferRequest(
            parameters={} if timeout_s is None else {"timeout": int(timeout_s * 1e6)},
            inputs=tuple(from_numpy(name, array) for name, array in inputs.items()),
            outputs=None if outputs is None else tuple(v2.RequestedOutput(o) for o in outputs),
            binary_default=True,
        )
        body, header_length = v2.encode_request(request)
        return body, {} if header_length is None else {HEADER_LENGTH: str(header_length)}


def _checked(answer: httpx.Response) -> httpx.Response:
    if not answer.is_success:
        raise translate_error(answer)
    return answer


def _arrays(answer: httpx.Response) -> dict[str, Array]:
    length = v2.parse_header_length(answer.headers.get(HEADER_LENGTH))
    # The limit bounds what a server makes of strangers' bodies; this answer was asked for.
    limits = v2.Limits(body_bytes=max(len(answer.content), v2.DEFAULT.body_bytes))
    response = v2.decode_response(answer.content, length, limits)
    return {tensor.name: to_numpy(tensor) for tensor in response.outputs}


def alias_wish(to: int | str | Split, *, now: bool) -> bytes:
    where = {"split": dict(to)} if isinstance(to, Mapping) else {"version": check_version(to)}
    return msgspec.json.encode({**where, "now": now})


def _digest(path: Path) -> tuple[str, int]:
    """Of a file: `sha256:…` and its size in bytes."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return f"sha256:{digest}", file.tell()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error


def _pieces(path: Path, size: int, progress: Progress | None) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece
            if progress is not None:
                progress(file.tell(), size)


def _timeout(timeout_s: float | None) -> httpx.Timeout:
    # Without a deadline of its own a request has the server's default, which the client does
    # not know; the server always answers in the end.
    return httpx.Timeout(10.0, read=None if timeout_s is None else timeout_s + _GRACE_S)


class RoostClient:
    """A connection pool to one gateway. Use it as a context manager, or `close` it."""

    def __init__(self, url: str = "http://127.0.0.1:8000") -> None:
        self._calls = _Calls(url)
        self._http = httpx.Client(timeout=60.0, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def push(
        self,
        name: str,
        file: str | Path,
        version: int | str | None = None,
        spec: ModelSpec | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """Registers a model file and returns its manifest; `version` None is the next one.

        The file is sent only when the repository does not have it yet. Raises
        `AlreadyExists` when the version is there with other content.
        """
        path = Path(file)
        method, url, _ = self._calls.register(name, version, "", None)  # checks name and version
        digest, size = _digest(path)
        if self._send("HEAD", self._calls.blob(digest)).status_code != httpx.codes.OK:
            _checked(
                self._send(
                    "PUT",
                    self._calls.blob(digest),
                    content=_pieces(path, size, progress),
                    headers={"Content-Length": str(size)},
                    timeout=_UPLOAD_TIMEOUT,
                )
            )
        _, _, body = self._calls.register(name, version, digest, spec)
        answer = _checked(self._send(method, url, content=body, timeout=_UPLOAD_TIMEOUT))
        return msgspec.json.decode(answer.content, type=Manifest)

    def infer(
        self,
        name: str,
        inputs: Mapping[str, Array],
        version: int | str | None = None,
        timeout_s: float | None = None,
        outputs: Outputs = None,
    ) -> dict[str, Array]:
        """The outputs (all, or those named) by name. `timeout_s` is the request's deadline."""
        body, headers = self._calls.infer(inputs, timeout_s, outputs)
        answer = self._send(
            "POST",
            f"{self._calls.model(name, version)}/infer",
            content=body,
            headers=headers,
            timeout=_timeout(timeout_s),
        )
        return _arrays(_checked(answer))

    def list(self) -> list[dict[str, Any]]:
        """The repository index: name, version, state, reason (where it is), size_bytes."""
        index: list[dict[str, Any]] = _checked(self._send("GET", self._calls.index())).json()
        return index

    def remove(self, name: str, version: int | str | None = None) -> None:
        """Removes one version, or the whole model."""
        _checked(self._send("DELETE", self._calls.stored(name, version)))

    def unload(self, name: str) -> None:
        """Makes the model, all its versions, unavailable until `load`."""
        _checked(self._send("POST", f"{self._calls.stored(name)}/unload"))

    def load(self, name: str) -> None:
        """Takes `unload` back; returns when the model can be asked."""
        _checked(self._send("POST", f"{self._calls.stored(name)}/load"))

    def aliases(self, name: str) -> Items:
        """Where the model's aliases lead: `alias`, `version`, `split`, and what is `pending`."""
        found: Items = _checked(self._send("GET", self._calls.alias(name))).json()["aliases"]
        return found

    def set_alias(
        self, name: str, alias: str, to: int | str | Split, *, now: bool = False
    ) -> dict[str, Any]:
        """Lets the alias lead to a version, or to several by their weights: once they are bound
        as often as what it leads to at present, or `now`. Returns where it leads at first."""
        url, wish = self._calls.alias(name, alias), alias_wish(to, now=now)
        told: dict[str, Any] = _checked(self._send("PUT", url, content=wish)).json()
        return told

    def quarantined(self) -> Items:
        """The versions that ended engines and are kept from them: `model`, `reason`, `since`,
        `worker`, `deaths`; the latest first."""
        answer = _checked(self._send("GET", self._calls.quarantine()))
        found: Items = answer.json()["quarantined"]
        return found

    def release(self, name: str, version: int | str | None = None) -> Ids:
        """Takes a model, or one version of it, out of quarantine; returns which were in it."""
        answer = _checked(self._send("DELETE", self._calls.quarantine(name, version)))
        released: Ids = answer.json()["released"]
        return released

    def remove_alias(self, name: str, alias: str) -> None:
        _checked(self._send("DELETE", self._calls.alias(name, alias)))

    def metadata(self, name: str, version: int | str | None = None) -> dict[str, Any]:
        """The protocol's model metadata: versions, platform, inputs, outputs."""
        answer = _checked(self._send("GET", self._calls.model(name, version)))
        metadata: dict[str, Any] = answer.json()
        return metadata

    def ready(self) -> bool:
        """Whether the gateway can take requests now. False also when nothing answers."""
        try:
            answer = self._send("GET", f"{self._calls.url}/v2/health/ready")
        except Unavailable:
            return False
        return answer.status_code == httpx.codes.OK

    def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        try:
            return self._http.request(method, url, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _no_answer(self._calls.url, error) from error


class AsyncRoostClient:
    """`RoostClient` for asyncio."""

    def __init__(self, url: str = "http://127.0.0.1:8000") -> None:
        self._calls = _Calls(url)
        self._http = httpx.AsyncClient(timeout=60.0, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def push(
        self,
        name: str,
        file: str | Path,
        version: int | str | None = None,
        spec: ModelSpec | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """See `RoostClient.push`."""
        path = Path(file)
        method, url, _ = self._calls.register(name, version, "", None)  # checks name and version
        digest, size = await asyncio.to_thread(_digest, path)
        if (await self._send("HEAD", self._calls.blob(digest))).status_code != httpx.codes.OK:

            async def pieces() -> AsyncIterator[bytes]:
                source = _pieces(path, size, progress)
                while piece := await asyncio.to_thread(next, source, b""):
                    yield piece

            sent = await self._send(
                "PUT",
                self._calls.blob(digest),
                content=pieces(),
                headers={"Content-Length": str(size)},
                timeout=_UPLOAD_TIMEOUT,
            )
            _checked(sent)
        _, _, body = self._calls.register(name, version, digest, spec)
        answer = _checked(await self._send(method, url, content=body, timeout=_UPLOAD_TIMEOUT))
        return msgspec.json.decode(answer.content, type=Manifest)

    async def infer(
        self,
        name: str,
        inputs: Mapping[str, Array],
        version: int | str | None = None,
        timeout_s: float | None = None,
        outputs: Outputs = None,
    ) -> dict[str, Array]:
        """See `RoostClient.infer`."""
        body, headers = self._calls.infer(inputs, timeout_s, outputs)
        answer = await self._send(
            "POST",
            f"{self._calls.model(name, version)}/infer",
            content=body,
            headers=headers,
            timeout=_timeout(timeout_s),
        )
        return _arrays(_checked(answer))

    async def list(self) -> list[dict[str, Any]]:
        """See `RoostClient.list`."""
        answer = _checked(await self._send("GET", self._calls.index()))
        index: list[dict[str, Any]] = answer.json()
        return index

    async def remove(self, name: str, version: int | str | None = None) -> None:
        """See `RoostClient.remove`."""
        _checked(await self._send("DELETE", self._calls.stored(name, version)))

    async def unload(self, name: str) -> None:
        """See `RoostClient.unload`."""
        _checked(await self._send("POST", f"{self._calls.stored(name)}/unload"))

    async def load(self, name: str) -> None:
        """See `RoostClient.load`."""
        _checked(await self._send("POST", f"{self._calls.stored(name)}/load"))

    async def aliases(self, name: str) -> Items:
        """See `RoostClient.aliases`."""
        answer = _checked(await self._send("GET", self._calls.alias(name)))
        found: Items = answer.json()["aliases"]
        return found

    async def set_alias(
        self, name: str, alias: str, to: int | str | Split, *, now: bool = False
    ) -> dict[str, Any]:
        """See `RoostClient.set_alias`."""
        url, wish = self._calls.alias(name, alias), alias_wish(to, now=now)
        told: dict[str, Any] = _checked(await self._send("PUT", url, content=wish)).json()
        return told

    async def quarantined(self) -> Items:
        """See `RoostClient.quarantined`."""
        answer = _checked(await self._send("GET", self._calls.quarantine()))
        found: Items = answer.json()["quarantined"]
        return found

    async def release(self, name: str, version: int | str | None = None) -> Ids:
        """See `RoostClient.release`."""
        answer = _checked(await self._send("DELETE", self._calls.quarantine(name, version)))
        released: Ids = answer.json()["released"]
        return released

    async def remove_alias(self, name: str, alias: str) -> None:
        """See `RoostClient.remove_alias`."""
        _checked(await self._send("DELETE", self._calls.alias(name, alias)))

    async def metadata(self, name: str, version: int | str | None = None) -> dict[str, Any]:
        """See `RoostClient.metadata`."""
        answer = _checked(await self._send("GET", self._calls.model(name, version)))
        metadata: dict[str, Any] = answer.json()
        return metadata

    async def ready(self) -> bool:
        """See `RoostClient.ready`."""
        try:
            answer = await self._send("GET", f"{self._calls.url}/v2/health/ready")
        except Unavailable:
            return False
        return answer.status_code == httpx.codes.OK

    async def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        try:
            return await self._http.request(method, url, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _no_answer(self._calls.url, error) from error


def _no_answer(url: str, error: Exception) -> Unavailable:
    return Unavailable(f"no answer from {url}: {str(error) or type(error).__name__}")
