"""What docs/guarantees.md promises, on real processes: `python -m benchmarks faults`, in short."""

from __future__ import annotations

import sys

import pytest

from benchmarks.faultkinds import LONGEST_S
from benchmarks.faults import Report, roll, torture
from benchmarks.faulttable import table
from benchmarks.ledger import Verdict

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]
SEED = 20261123
KINDS = {
    "kill", "kill engine", "suspend", "suspend engine", "restart", "two leaders",
    "broker: kill", "broker: restart", "broker: suspend", "broker: memory alarm",
    "broker: disk alarm", "broker: cut connections",
    "store: kill", "store: suspend", "store: flush",
    "link: latency and loss", "link: stopped", "link: half-open", "link: cut",
    "clock step", "disk full",
}  # fmt: skip
RATE = 40.0
IN_TIME_S = 15.0
"""For a 503: publishing gives up after 5 s, and a gateway may have been suspended meanwhile."""


def told(report: Report) -> str:
    """For whoever has to find out what went wrong."""
    ledger = report.ledger
    lines = [f"seed {report.seed}", table(ledger, report.faults), str(dict(ledger.codes))]
    return "\n".join([*lines, *map(str, report.faults), *map(str, ledger.odd), *report.failed])


async def test_no_fault_of_any_kind_loses_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind once, under load over HTTP, AMQP, gRPC and with jobs: every request is answered,
    none wrong, and afterwards all is well again by itself."""
    report = await torture(0, SEED, rate=RATE, every_s=0.5, each=True)
    with capsys.disabled():
        sys.stdout.write(f"\nfaults: seed {SEED}, {len(report.faults)} kinds once each\n")
        for what, why in report.missing.items():
            sys.stdout.write(f"faults: {what} could not be done: {why}\n")
    ledger = report.ledger
    assert not report.failed, told(report)
    assert not ledger.total(Verdict.SILENT, Verdict.WRONG), told(report)
    assert kinds(report) | set(report.missing) == KINDS
    refused = [each for each in ledger.missed if each.detail.startswith("503")]
    assert max(each.ended - each.asked for each in refused) < IN_TIME_S, told(report)
    # After a crash between an answer and its acknowledgement: as many as can be under way.
    assert ledger.doubles <= RATE * LONGEST_S, told(report)
    assert ledger.total(Verdict.RIGHT) > ledger.total() / 2, told(report)


async def test_restarting_everything_in_order_fails_no_request() -> None:
    """Placers, gateways, workers, store and broker, one by one. Clients try again, within their
    deadline, what was not accepted or told to come again; nothing else may happen to them."""
    report = await roll(0, SEED, rate=RATE)
    ledger = report.ledger
    assert ledger.total() == ledger.total(Verdict.RIGHT) > 0, told(report)
    assert ledger.doubles <= RATE, told(report)


def kinds(report: Report) -> set[str]:
    return {fault.what for fault in report.faults}
