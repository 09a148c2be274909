"""Searches for bytes that break a target, by coverage: `python -m tests.fuzz TARGET --seconds N`.

Needs atheris (`pip install -e .[fuzz]`). Without a target it lists them; `all` takes them in turn,
N seconds each. What was found lies in the corpus folder as `crash-…`, `timeout-…` or `oom-…`, and
runs again with `python -m tests.fuzz TARGET FILE`. The corpus is kept, and the next search begins
with it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

INSTRUMENTED = ["shared", "services", "roost"]
INPUT_TIMEOUT_S = 20
MEMORY_MB = 2048


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?")
    parser.add_argument("files", nargs="*", type=Path, help="run these inputs, and no others")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz"))
    args = parser.parse_args()
    if args.files:
        return _replay(args.target, args.files)
    if args.target is None or args.target == "all":
        from tests.fuzz.targets import TARGETS

        if args.target is None:
            for each in TARGETS.values():
                sys.stdout.write(f"{each.name:18}{(each.run.__doc__ or '').splitlines()[0]}\n")
            return 0
        return max(_search(name, args.seconds, args.corpus) for name in TARGETS)
    return _search(args.target, args.seconds, args.corpus)


def _search(name: str, seconds: int, corpus: Path) -> int:
    """In a process of its own, which libFuzzer ends as it likes. The exit status: 0 when nothing
    was found."""
    folder = corpus / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.search", name, str(folder), str(seconds)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        told = ""
        for line in process.stderr:
            told = (told + line)[-200_000:]
    runs = re.findall(r"stat::number_of_executed_units:\s+(\d+)", told)
    edges = re.findall(r"cov: (\d+)", told)
    found = process.returncode != 0
    executions = int(runs[-1]) if runs else 0
    coverage = edges[-1] if edges else "?"
    verdict = "FOUND" if found else "nothing found"
    sys.stdout.write(
        f"{name:18}{executions:>12,} executions in {seconds} s, {coverage} edges: {verdict}\n"
    )
    sys.stdout.flush()
    if found:
        sys.stderr.write(told[-6000:])
    return int(found)


def _replay(name: str, files: list[Path]) -> int:
    from tests.fuzz.kit import timed, weighed
    from tests.fuzz.targets import TARGETS

    for file in files:
        timed(TARGETS[name].run, file.read_bytes())
        weighed(TARGETS[name].run, file.read_bytes())
        sys.stdout.write(f"{file}: survived{os.linesep}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
