"""One search by atheris, in this process: `python -m tests.fuzz.search TARGET FOLDER SECONDS`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris

from tests.fuzz.__main__ import INPUT_TIMEOUT_S, INSTRUMENTED, MEMORY_MB

with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
    from shared.logs import configure
    from tests.fuzz.kit import EXTREMES, MOST_BYTES, Target, timed
    from tests.fuzz.targets import TARGETS


def main(name: str, folder: Path, seconds: int) -> None:
    target = TARGETS[name]
    # Lines are made, so that what cannot be logged is found too; nobody reads them.
    configure("fuzz", "json", "info", stream=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    for number, seed in enumerate(target.seeds):
        (folder / f"seed-{number}").write_bytes(seed)
    words = folder.with_suffix(".dict")
    words.write_text(_dictionary(target))
    options = [
        f"-dict={words}", f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}",
        f"-timeout={INPUT_TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(folder)], lambda data: timed(target.run, data))
    atheris.Fuzz()


def _dictionary(target: Target) -> str:
    words = {*target.words, *(word for word in EXTREMES if len(word) <= 40)}
    return "".join(
        '"{}"\n'.format("".join(f"\\x{byte:02x}" for byte in word)) for word in sorted(words)
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
