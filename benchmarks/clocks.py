"""Wall clocks that can be set off, one for each service: a library before libc's."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_name("clockshift.c")


class Clocks:
    """Of services started with `environment(name)`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._library = folder / "clockshift.so"
        self.missing = ""
        """Why clocks cannot be set here; empty when they can."""

    def build(self) -> None:
        """Blocks. Says in `missing` why it could not."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if sys.platform != "linux" or compiler is None:
            self.missing = "there is no Linux, or no C compiler"
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [
            compiler,
            "-O2",
            "-shared",
            "-fPIC",
            "-o",
            str(self._library),
            str(_SOURCE),
            "-ldl",
        ]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            self.missing = f"the library does not compile: {made.stderr.strip()[:200]}"

    def environment(self, name: str) -> dict[str, str]:
        """What a service's process must be started with; its clock goes right at first."""
        if self.missing:
            return {}
        file = self._folder / name
        if not file.exists():
            self.set_off(name, 0.0)
        return {"LD_PRELOAD": str(self._library), "FAULTS_CLOCK": str(file)}

    def set_off(self, name: str, seconds: float) -> None:
        """From now on its clock is ahead by so many (behind, below 0), also when restarted."""
        # In place: the file is mapped. Eight bytes at once are seen whole.
        with (self._folder / name).open("r+b" if (self._folder / name).exists() else "wb") as file:
            file.write(struct.pack("=q", int(seconds * 1e9)))
