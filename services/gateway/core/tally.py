"""What gateways count of a model version, to be told as Triton's statistics.

Counters only grow, within one start of a gateway. Each gateway keeps its own and the store
holds the last word of each; the sum over gateways is what any of them tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from shared.names import ModelId

_MOST_US: Final = 3600 * 1_000_000
_MOST_ROWS: Final = 65536


class Batches(msgspec.Struct, array_like=True):
    """Of batches with one number of rows."""

    runs: float = 0.0
    """A request that had r of a batch's R rows is r/R of a run. So batches of which only a part
    came through gateways (the rest from AMQP producers) count for that part."""
    ns: float = 0.0
    """Nanoseconds on the device, in the same shares."""


class Tally(msgspec.Struct, array_like=True):
    """Of one model version. Fields that are added later go to the end, with a default."""

    succeeded: int = 0
    succeeded_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    queue_ns: int = 0
    """Of those that succeeded: from the publish to the answer, less the time on the device."""
    compute_ns: int = 0
    """Of those that succeeded: each counts the whole of its batch's time."""
    rows: int = 0
    last_ms: int = 0
    """Unix time of the last request."""
    batches: dict[int, Batches] = {}

    def add(self, other: Tally) -> None:
        """Adds another gateway's."""
        self.succeeded += other.succeeded
        self.succeeded_ns += other.succeeded_ns
        self.failed += other.failed
        self.failed_ns += other.failed_ns
        self.queue_ns += other.queue_ns
        self.compute_ns += other.compute_ns
        self.rows += other.rows
        self.last_ms = max(self.last_ms, other.last_ms)
        for rows, batches in other.batches.items():
            mine = self.batches.setdefault(rows, Batches())
            mine.runs += batches.runs
            mine.ns += batches.ns


class Ran(msgspec.Struct, frozen=True):
    """How a request that succeeded was run."""

    rows: int
    batch_rows: int
    waited_s: float
    """From its publish to its answer, the time on the device included."""
    compute_us: int


class Tallies:
    """This gateway's counters, and which of them have changed since they were last told."""

    def __init__(self) -> None:
        self._of: dict[ModelId, Tally] = {}
        self._changed: set[ModelId] = set()

    def __repr__(self) -> str:
        return f"<Tallies of {len(self._of)} models, {len(self._changed)} untold>"

    def note(self, model: ModelId, seconds: float, ran: Ran | None, wall: float) -> None:
        """One request ended; `ran` is None when it failed. `seconds` from its headers to its
        end; `wall` is Unix time."""
        tally = self._of.get(model)
        if tally is None:
            tally = self._of[model] = Tally()
        self._changed.add(model)
        tally.last_ms = int(wall * 1000)
        if ran is None:
            tally.failed += 1
            tally.failed_ns += int(seconds * 1e9)
            return
        # Told by a reply's headers, so by whoever can write into the reply queue.
        compute_ns = min(max(ran.compute_us, 0), _MOST_US) * 1000
        tally.succeeded += 1
        tally.succeeded_ns += int(seconds * 1e9)
        tally.compute_ns += compute_ns
        tally.queue_ns += max(int(ran.waited_s * 1e9) - compute_ns, 0)
        tally.rows += ran.rows
        # A worker of another mind about rows than we: never more than the whole batch.
        batch_rows = max(min(ran.batch_rows, _MOST_ROWS), ran.rows, 1)
        share = ran.rows / batch_rows
        batches = tally.batches.get(batch_rows)
        if batches is None:
            batches = tally.batches[batch_rows] = Batches()
        batches.runs += share
        batches.ns += compute_ns * share

    def forget(self, name: str) -> None:
        """A model that was removed."""
        for model in [model for model in self._of if model.partition("/")[0] == name]:
            del self._of[model]
            self._changed.discard(model)

    def changes(self) -> dict[ModelId, bytes]:
        """What has changed since the last call, encoded."""
        changed = {model: _encode(self._of[model]) for model in self._changed}
        self._changed.clear()
        return changed

    def untold(self, models: Iterable[ModelId]) -> None:
        """These could not be told."""
        self._changed.update(model for model in models if model in self._of)

    def tell_all(self) -> None:
        """Everything counts as changed: who was told may have forgotten."""
        self._changed.update(self._of)

    def sum(self, model: ModelId, others: Iterable[bytes]) -> Tally:
        """Of this gateway and, as far as they can be read, of others."""
        total = Tally(batches={})
        if model in self._of:
            total.add(self._of[model])
        for data in others:
            try:
                total.add(_decode(data))
            except (ValueError, RecursionError):
                continue  # of a gateway of another release
        return total


def statistics(
    name: str, version: str, tally: Tally, memory: list[dict[str, Any]]
) -> dict[str, Any]:
    """One entry of `model_stats`, with every key of Triton's, since its clients read them
    unchecked. What is not measured apart, is 0: copies to and from the device are in
    `compute_infer`, and there is no response cache."""
    done = tally.succeeded
    runs = sum(batches.runs for batches in tally.batches.values())
    return {
        "name": name,
        "version": version,
        "last_inference": tally.last_ms,
        "inference_count": tally.rows,
        "execution_count": round(runs),
        "inference_stats": {
            "success": _duration(done, tally.succeeded_ns),
            "fail": _duration(tally.failed, tally.failed_ns),
            "queue": _duration(done, tally.queue_ns),
            "compute_input": _duration(done, 0),
            "compute_infer": _duration(done, tally.compute_ns),
            "compute_output": _duration(done, 0),
            "cache_hit": _duration(0, 0),
            "cache_miss": _duration(0, 0),
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(round(batches.runs), 0),
                "compute_infer": _duration(round(batches.runs), round(batches.ns)),
                "compute_output": _duration(round(batches.runs), 0),
            }
            for rows, batches in sorted(tally.batches.items())
        ],
        "memory_usage": memory,
    }


def _duration(count: int, ns: int) -> dict[str, int]:
    return {"count": count, "ns": ns}


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Tally).decode
