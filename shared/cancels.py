"""Requests that nobody awaits any more, as gateways tell workers (docs/adr/0016).

A note on `store.port.TOPIC_CANCELLED`, only when a client has hung up: in the usual case nothing
is sent, kept or looked up. It may be lost, and then the request runs in vain.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Annotated, Final

import msgspec

MAX_NOTE: Final = 1000
"""Requests in one note."""
_MAX_KEPT: Final = 100_000
_MAX_AHEAD_MS: Final = 3600_000
"""No request has a later deadline than that; a wrong clock must not keep ids for ever."""


class Cancelled(msgspec.Struct, frozen=True, array_like=True):
    """One request."""

    correlation_id: Annotated[str, msgspec.Meta(max_length=255)]
    deadline_ms: int
    """Unix time: afterwards the request would not run anyway."""


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(
    Annotated[tuple[Cancelled, ...], msgspec.Meta(max_length=MAX_NOTE)]
).decode


def encode(cancelled: Iterable[Cancelled]) -> bytes:
    return _encode(tuple(cancelled))


class CancelledRequests:
    """What a worker has been told. A request stays in it until its deadline, since it may come
    late (from the queue of a cold model) or twice (redelivered). The oldest go first when there
    are too many."""

    def __init__(self) -> None:
        self._until: dict[str, int] = {}
        self._untried = 0
        """How many came since all were looked at for those that have expired."""

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, correlation_id: str | None) -> bool:
        return correlation_id in self._until

    def note(self, data: bytes, now_ms: int) -> tuple[str, ...]:
        """Takes a note in, and returns whom it names. `now_ms` is Unix time. A note that is none
        says nothing."""
        try:
            told = _decode(data)
        except (ValueError, RecursionError):  # msgspec's errors, and text that is no UTF-8
            return ()
        for each in told:
            self._until[each.correlation_id] = min(each.deadline_ms, now_ms + _MAX_AHEAD_MS)
        self._untried += len(told)
        if self._untried > _MAX_KEPT // 10:  # not at each note: it takes milliseconds
            self._until = {id_: at for id_, at in self._until.items() if at > now_ms}
            self._untried = 0
        too_many = max(len(self._until) - _MAX_KEPT, 0)
        for id_ in list(itertools.islice(self._until, too_many)):
            del self._until[id_]
        return tuple(each.correlation_id for each in told)
