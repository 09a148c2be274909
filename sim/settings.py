"""What the simulation holds constant: the time that messages take, and how services are set.

Figures are of the small machine of `docs/results` (2 shared cores). They shift every latency by
the same; no policy is helped by them.
"""

from __future__ import annotations

from typing import Final

import msgspec

from services.worker.config import WorkerConfig

BROKER_HOP_S: Final = 0.0003
"""From a producer through the broker to its consumer: to publish one message costs 160 µs, to
consume and acknowledge it 34 (docs/results/README.md, "CPU per message"), and the broker and the
consumer are woken once each, 35 to 65 µs (there, "The handover")."""
HANDOVER_S: Final = 0.0000535
"""From agent to engine, and as long back: together 107 µs at the median beyond the call itself
(docs/results/benchmarks.md, `engine`)."""
TURN_S: Final = 0.0002
"""What is delivered to a worker within one turn of its event loop is decided on together: four
deliveries or so, at 34 µs to consume and 9 to read one (docs/results/README.md)."""
STORE_HOP_S: Final = 0.001
"""To write a report or an assignment and hint of it, and for the other side to read it: three
round trips of a hundred or two µs, and two wake-ups. Nothing finer was measured; a tick is 200
times as long."""
FETCH_S: Final = 0.002
"""To read a manifest, a profile and a layout from a local directory, in a thread."""
CONSUME_S: Final = 0.001
"""To declare a queue, open a channel and consume: three round trips of the broker."""
CANCEL_S: Final = 0.0003
REPORTS_APART_S: Final = 0.02
"""Between two reports of one worker, and between two cycles of the placer
(services/worker/report.py, services/placer/cycle.py)."""

_WORKER: Final = WorkerConfig()


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a run may vary beside workload, fleet and policy."""

    timeout_s: float = 30.0
    """A request's time from its arrival: its deadline. The gateway's default."""
    timeout_targets: float = float("inf")
    """The same in targets of its model; whichever is sooner. 1: nobody waits for what is late."""
    report_interval_s: float = _WORKER.report_interval_s
    report_ttl_s: float = _WORKER.report_ttl_s
    engine_start_s: float = 3.0
    """From the engine's death to its successor, which imports torch."""
    profiled: bool = True
    """What batches and loads of every model take was measured beforehand, by a worker of the same
    kind of device. False: each worker finds out, and the first tells the others."""
    service_cv: float = 0.0
    """Coefficient of variation of a batch's time on the device about its measured mean
    (log-normal)."""
