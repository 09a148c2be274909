"""`python -m benchmarks.counted SOCKET MODULE`: runs a service that tells its Python objects.

Whoever connects to the Unix socket gets, after a full collection, how many objects and allocated
blocks the process has, and of which types, as JSON. A thread of its own answers: what is measured
does not know of it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import runpy
import socket
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

_TYPES = 60


def counts() -> dict[str, Any]:
    gc.collect()
    objects = gc.get_objects()
    types = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in objects)
    return {
        "objects": len(objects),
        "blocks": sys.getallocatedblocks(),
        "types": dict(types.most_common(_TYPES)),
    }


def ask(path: Path) -> dict[str, Any]:
    """What the process at this socket says. Blocks; raises `OSError`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30.0)
        connection.connect(str(path))
        with connection.makefile("rb") as answer:
            told: dict[str, Any] = json.loads(answer.read())
            return told


def _serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(json.dumps(counts()).encode())


def main() -> None:
    _, path, module = sys.argv
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    threading.Thread(target=_serve, args=(listener,), name="counted", daemon=True).start()
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
