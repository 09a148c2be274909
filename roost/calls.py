"""What both clients share: how requests are made and answers are read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx
import msgspec
import numpy as np

from roost.trust import why
from shared import v2
from shared.aliases import check_address, check_alias
from shared.errors import STATUS, InvalidRequest, RoostError, Unavailable, from_code
from shared.keys import TOKEN
from shared.models import ModelSpec
from shared.names import HEADER_CODE, HEADER_LENGTH, check_name, check_version
from shared.tenants import check_tenant
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
UPLOAD_TIMEOUT: Final = httpx.Timeout(60.0, read=600.0)
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


def authorization(api_key: str | None = None) -> dict[str, str]:
    """The header that shows an API key; None: that of `ROOST_API_KEY`, if any. Raises
    `InvalidRequest`, without the key, for what cannot be one."""
    key = (os.environ.get("ROOST_API_KEY", "") if api_key is None else api_key).strip()
    if not key:
        return {}
    if not re.fullmatch(TOKEN, key):
        raise InvalidRequest("the API key is not one: they look like rk_<12 digits>_<64 digits>")
    return {"authorization": f"Bearer {key}"}


class Calls:
    """URLs and bodies, by one gateway's URL."""

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

    def keys(self, id_: str | None = None) -> str:
        where = f"{self.url}/v2/repository/keys"
        return where if id_ is None else f"{where}/{quote(id_, safe='')}"

    def new_key(
        self, tenant: str, scopes: Sequence[str], lifetime_s: float | None, note: str
    ) -> bytes:
        """The body that asks for an API key."""
        return msgspec.json.encode(
            {"tenant": tenant, "scopes": scopes, "lifetime_s": lifetime_s, "note": note}
        )

    def tenants(self, name: str | None = None) -> str:
        where = f"{self.url}/v2/repository/tenants"
        return where if name is None else f"{where}/{check_tenant(name)}"

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


def checked(answer: httpx.Response) -> httpx.Response:
    if not answer.is_success:
        raise translate_error(answer)
    return answer


def arrays(answer: httpx.Response) -> dict[str, Array]:
    length = v2.parse_header_length(answer.headers.get(HEADER_LENGTH))
    # The limit bounds what a server makes of strangers' bodies; this answer was asked for.
    limits = v2.Limits(body_bytes=max(len(answer.content), v2.DEFAULT.body_bytes))
    response = v2.decode_response(answer.content, length, limits)
    return {tensor.name: to_numpy(tensor) for tensor in response.outputs}


def alias_wish(to: int | str | Split, *, now: bool) -> bytes:
    where = {"split": dict(to)} if isinstance(to, Mapping) else {"version": check_version(to)}
    return msgspec.json.encode({**where, "now": now})


def digest_of(path: Path) -> tuple[str, int]:
    """Of a file: `sha256:…` and its size in bytes."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return f"sha256:{digest}", file.tell()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error


def pieces_of(path: Path, size: int, progress: Progress | None) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece
            if progress is not None:
                progress(file.tell(), size)


def timeout_of(timeout_s: float | None) -> httpx.Timeout:
    # Without a deadline of its own a request has the server's default, which the client does
    # not know; the server always answers in the end.
    return httpx.Timeout(10.0, read=None if timeout_s is None else timeout_s + _GRACE_S)


def no_answer(url: str, error: Exception) -> Unavailable:
    return Unavailable(f"no answer from {url}: {why(url, error)}")
