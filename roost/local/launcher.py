"""Becomes another program that does not outlive its parent. Run as a script, by path.

    launcher.py PARENT_PID PROGRAM ARGUMENT…

Setting the parent-death signal between fork and exec of a threaded Python (`preexec_fn`) can
deadlock; a fresh interpreter that sets it and then execs cannot.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != int(parent):
            sys.exit("the parent was gone before its child began")
    os.execvpe(command[0], command, os.environ)  # noqa: S606


if __name__ == "__main__":
    main()
