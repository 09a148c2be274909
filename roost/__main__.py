"""The `roost` command: run a stack, push models, ask them, and see why they are where they are."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from roost.commands import (
    aliases,
    dead,
    explain,
    infer,
    jobs,
    keys,
    models,
    quarantine,
    scale,
    up,
    whatif,
)
from roost.trust import note_options
from shared.errors import RoostError

URL = os.environ.get("ROOST_URL", "http://127.0.0.1:8000")
PLACER_URL = os.environ.get("ROOST_PLACER_URL", "http://127.0.0.1:8003")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="roost",
        description="Serve many PyTorch models on few devices, placed dynamically.",
    )
    parser.add_argument("--version", action="version", version=f"roost {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up.add_parser(commands)
    models.add_parsers(commands, URL)
    aliases.add_parser(commands, URL)
    infer.add_parser(commands, URL)
    jobs.add_parser(commands, URL)
    explain.add_parser(commands, PLACER_URL)
    quarantine.add_parser(commands, URL)
    dead.add_parser(commands, URL)
    keys.add_parsers(commands)
    whatif.add_parser(commands)
    scale.add_parser(commands, PLACER_URL)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit status: 0 done, 1 refused or failed (one line says why), 2 usage."""
    arguments = build_parser().parse_args(argv)
    note_options(arguments)
    try:
        status: int = arguments.run(arguments)
    except RoostError as error:
        print(f"roost: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output (head, say) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _version() -> str:
    try:
        return metadata.version("roost")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
