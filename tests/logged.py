"""Log lines as they are really written, for tests that look into them."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

import structlog

from shared.config import LogLevel
from shared.logs import _QUIET, configure


@contextlib.contextmanager
def logged(level: LogLevel = "info") -> Iterator[io.StringIO]:
    """All that is logged inside the block, in JSON."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, number = root.handlers[:], root.level
    quiet = {name: logging.getLogger(name).level for name in _QUIET}
    stream = io.StringIO()
    configure("test", "json", level, stream=stream)
    try:
        yield stream
    finally:
        structlog.configure(**before)
        root.handlers[:] = handlers
        root.setLevel(number)
        logging.captureWarnings(capture=False)
        for name, before_it in quiet.items():
            logging.getLogger(name).setLevel(before_it)
