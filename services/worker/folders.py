"""Temporary folders that processes which may be killed leave behind, told from those in use."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def locked(folder: str | Path) -> int | None:
    """A descriptor that holds the folder's lock; None when a living process does, when the folder
    is gone, or not ours to open."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), Path(folder).stat()):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
