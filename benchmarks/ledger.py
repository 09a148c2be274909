"""The book of what became of each request."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple

import msgspec

from benchmarks.known import Model

_SHOWN: Final = 50


class Verdict(StrEnum):
    """What became of a request."""

    RIGHT = "answered right"
    TOLD = "answered with a clear error"
    CUT = "connection lost before an answer"
    """Over HTTP and gRPC; the client knows, and can ask again."""
    REFUSED = "not accepted"
    """No connection, or the broker did not confirm: the client knows."""
    UNSURE = "confirmation lost, and no answer"
    """Over AMQP; the producer knows that it does not know."""
    WRONG = "answered wrong"
    SILENT = "never answered"
    """Accepted, and no answer by its deadline and some slack."""


class Ended(NamedTuple):
    """How a request ended."""

    verdict: Verdict
    detail: str = ""
    """Of an error its code, of what should not be what was there."""


class Missed(msgspec.Struct, frozen=True):
    """A request that was not answered right."""

    verdict: Verdict
    way: str
    model: str
    asked: float
    """Unix time; so is `ended`."""
    ended: float
    detail: str


class Ledger:
    """Counts; what was not answered right is kept, to be set beside the faults."""

    def __init__(self) -> None:
        self.of: Counter[tuple[str, Verdict]] = Counter()
        """By way and verdict."""
        self.codes: Counter[str] = Counter()
        self.again = 0
        """Requests that a patient client asked once more (see `ways.Patience`)."""
        self.doubles = 0
        """Answers beyond the first, over AMQP; over HTTP and gRPC there can be none."""
        self.late = 0
        """Answers over AMQP that came later than the deadline and some slack."""
        self.missed: list[Missed] = []
        self.odd: list[Missed] = []
        """Of those, the first that ended as none may."""
        self.slowest_s = 0.0

    def note(self, way: str, model: str, asked: float, ended: Ended) -> None:
        verdict, detail = ended
        now = time.time()
        self.of[way, verdict] += 1
        if way != "jobs":  # they have all the time they want
            self.slowest_s = max(self.slowest_s, now - asked)
        if verdict is Verdict.RIGHT:
            return
        missed = Missed(verdict, way, model, asked, now, detail)
        self.missed.append(missed)
        if verdict is Verdict.TOLD:
            self.codes[detail] += 1
        if verdict in {Verdict.WRONG, Verdict.SILENT} and len(self.odd) < _SHOWN:
            self.odd.append(missed)

    def total(self, *verdicts: Verdict, way: str = "") -> int:
        """Of these verdicts, or of all; of one way, or of all."""
        wanted = verdicts or tuple(Verdict)
        return sum(
            count for (of, verdict), count in self.of.items()
            if verdict in wanted and way in {"", of}
        )  # fmt: skip


def judged(status: int, body: bytes, model: Model, x: list[int]) -> Ended:
    """Of an answer as HTTP has it; 200 is well, everything else must be an error that says so."""
    try:
        told = json.loads(body)
        if status != 200:
            return Ended(Verdict.TOLD, f"{status}: {told['error']}"[:60])
        given = told["outputs"][0]["data"]
    except (ValueError, LookupError, TypeError):
        return Ended(Verdict.WRONG, f"{status}: {body[:80]!r}")
    return compared(given, model, x)


def compared(given: Sequence[float], model: Model, x: list[int]) -> Ended:
    right = model.right(x)
    if list(given) == right:
        return Ended(Verdict.RIGHT)
    return Ended(Verdict.WRONG, f"{given} for {right}")
