"""What `roost up` and `roost scale` take for numbers of workers."""

from __future__ import annotations

import pytest

from roost.__main__ import build_parser
from roost.commands.scale import _runner
from roost.commands.up import _fleet
from roost.stack.scaler import CommandRunner, ComposeRunner, Limits


def fleet_of(*arguments: str) -> tuple[Limits, int]:
    return _fleet(build_parser().parse_args(["up", *arguments]))


@pytest.mark.parametrize(
    ("arguments", "limits", "begins"),
    [
        ((), Limits(1, 1), 1),
        (("--workers", "3"), Limits(3, 3), 3),
        (("--max-workers", "4"), Limits(1, 4), 1),
        (("--workers", "2", "--max-workers", "4"), Limits(1, 4), 2),
        (("--max-workers", "4", "--min-workers", "0"), Limits(0, 4), 0),
        (("--max-workers", "4", "--min-workers", "2"), Limits(2, 4), 2),
    ],
)
def test_how_many_workers_there_may_be(arguments, limits, begins):
    """Without --max-workers always the same number; with it from the least on."""
    assert fleet_of(*arguments) == (limits, begins)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--workers", "0"),
        ("--min-workers", "1"),
        ("--max-workers", "0", "--min-workers", "0"),
        ("--workers", "5", "--max-workers", "4"),
        ("--workers", "1", "--min-workers", "2", "--max-workers", "4"),
        ("--max-workers", "65"),
        ("--threads", "0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(arguments):
    """As usage errors, before anything is started."""
    with pytest.raises(SystemExit) as ended:
        fleet_of(*arguments)
    assert ended.value.code == 2


def test_how_workers_are_started_elsewhere():
    """By compose, or by a command that must be told the number."""
    parser = build_parser()
    compose = parser.parse_args(["scale", "--max-workers", "2", "--compose", "a.yml"])
    assert isinstance(_runner(compose), ComposeRunner)
    command = parser.parse_args(["scale", "--max-workers", "2", "--exec", "start {count}"])
    assert isinstance(_runner(command), CommandRunner)
    with pytest.raises(SystemExit):
        _runner(parser.parse_args(["scale", "--max-workers", "2", "--exec", "start"]))
