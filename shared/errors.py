"""One hierarchy of errors, and how an error travels.

Inside a process an error is an exception of this module; drivers' exceptions never travel
further than the adapter that knows the driver. Between processes an error is data: a `code`,
a message and whether trying again can help. HTTP status numbers exist only as `STATUS`, for
the HTTP edge and for the `roost-status` header of a reply.
"""

from __future__ import annotations

from typing import ClassVar, Final


class RoostError(Exception):
    """Base of everything that Roost tells a caller. `str(error)` is fit to be shown to them."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequest(RoostError):
    """The caller's bytes, names or shapes are wrong; the same request can never succeed."""

    code = "invalid_argument"


class Unauthenticated(RoostError):
    """No key, or one that is not known or not valid any more."""

    code = "unauthenticated"


class PermissionDenied(RoostError):
    """The key is known and does not allow this."""

    code = "permission_denied"


class ModelNotFound(RoostError):
    """No such model, or no such version of it, is registered."""

    code = "not_found"


class AlreadyExists(RoostError):
    """Something different is registered under this name and version; versions are immutable."""

    code = "already_exists"


class Conflict(RoostError):
    """Somebody else has changed, or still uses, what the caller wants to change."""

    code = "conflict"


class TooLarge(RoostError):
    """Body, header or tensor is beyond a limit. The message names the limit."""

    code = "too_large"


class Overloaded(RoostError):
    """A bounded queue is full. `retry_after_s` says when room is expected."""

    code = "resource_exhausted"
    retryable = True


class Unavailable(RoostError):
    """A part that the request needs is away (broker, worker, room on any device)."""

    code = "unavailable"
    retryable = True


class DeadlineExceeded(RoostError):
    """The request's deadline passed before there was an answer."""

    code = "deadline_exceeded"
    retryable = True


class ModelFailed(RoostError):
    """The model itself raised, or could not be loaded. The message is the model's."""

    code = "model_failed"


class Quarantined(RoostError):
    """The model, or this one request, has killed too many engines and is kept from them."""

    code = "quarantined"


class IdempotencyKeyReused(RoostError):
    """Another request was sent under this `Idempotency-Key` before."""

    code = "idempotency_key_reused"


class JobNotDone(RoostError):
    """The job has no result yet. `retry_after_s` says when to look again."""

    code = "job_not_done"
    retryable = True


class Internal(RoostError):
    """A fault of Roost's own."""

    code = "internal"
    retryable = True


STATUS: dict[str, int] = {
    "ok": 200,
    "invalid_argument": 400,
    "unauthenticated": 401,
    "permission_denied": 403,
    "not_found": 404,
    "conflict": 409,
    "already_exists": 409,
    "too_large": 413,
    "idempotency_key_reused": 422,
    "resource_exhausted": 429,
    "internal": 500,
    "model_failed": 500,
    "quarantined": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
}
"""HTTP status by error code (and `ok`)."""

_BY_CODE: dict[str, type[RoostError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest, Unauthenticated, PermissionDenied, ModelNotFound, AlreadyExists, Conflict,
        TooLarge, Overloaded, Unavailable, DeadlineExceeded, ModelFailed, Quarantined,
        IdempotencyKeyReused, JobNotDone, Internal,
    )
}  # fmt: skip


ECHOING: Final = frozenset({"invalid_argument", "model_failed"})
"""Codes whose messages quote the request, or are a model's own words about it: they are for who
asked, and stand in no log and no trace."""


def from_code(code: str, message: str) -> RoostError:
    """The exception for an error that arrived as data. An unknown code becomes `Internal`."""
    return _BY_CODE.get(code, Internal)(message)
