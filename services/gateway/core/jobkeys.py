"""The `Idempotency-Key` of a job: what it looks like, what it is called, and to what it leads.

As draft-ietf-httpapi-idempotency-key-header has it. Keys are not kept and not logged, but only the
names that follow from them: whoever knows a key can ask for its job.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

import msgspec

from services.gateway.core.jobs import ID_DIGITS, check_id, shard_of
from shared.errors import InvalidRequest
from shared.names import IDEMPOTENCY_KEY, IDEMPOTENCY_KEY_CHARS

_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\["\\])*)"\Z')
_HEADER_CHARS: Final = 2 * IDEMPOTENCY_KEY_CHARS + 2
"""Each may be escaped."""


class Claim(msgspec.Struct, frozen=True):
    """What a key leads to: the job, and what was asked by it."""

    id: str
    fingerprint: str

    def __post_init__(self) -> None:
        check_id(self.id)


def parse_key(text: str) -> str:
    """The key in the header: a string as RFC 8941 writes it, or, as most clients send it, the same
    without quotes. Raises `InvalidRequest`, which does not repeat it."""
    key = text.strip(" \t")
    if key.startswith('"'):
        quoted = _QUOTED.match(key) if len(key) <= _HEADER_CHARS else None
        key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else ""
    if not re.fullmatch(IDEMPOTENCY_KEY, key):
        raise InvalidRequest(
            f"Idempotency-Key must be 1 to {IDEMPOTENCY_KEY_CHARS} visible ASCII characters, in "
            "double quotes or without"
        )
    return key


def key_name(model: str, version: str | None, tenant: str, key: str) -> str:
    """What a key is called in the storage: formed like the ids of the model's jobs, so that it lies
    beside them. `version` as it stands in the address."""
    scope = msgspec.json.encode([tenant, model, version, key])
    return shard_of(model) + hashlib.sha256(scope).hexdigest()[:ID_DIGITS]


def fingerprint_of(body: bytes, header_length: int | None, split_key: str) -> str:
    """By which a request is known again: its v2 bytes, and what else decides its answer. Not its
    deadline's header nor its trace, which differ with every try. Some 20 ms for 10
    MiB."""
    digest = hashlib.sha256(msgspec.json.encode([header_length, split_key]))
    digest.update(body)
    return digest.hexdigest()


_claims: Final = msgspec.json.Decoder(Claim)


def encode_claim(claim: Claim) -> bytes:
    return msgspec.json.encode(claim)


def decode_claim(data: bytes) -> Claim:
    """Raises `ValueError`, `JobNotFound`."""
    try:
        return _claims.decode(data)
    except RecursionError as error:  # what is not known is skipped, however it is nested
        raise ValueError(str(error)) from None
