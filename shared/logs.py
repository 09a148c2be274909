"""Logs: one event per line, JSON for machines or columns for people, always on stderr.

`log = structlog.get_logger(__name__)` in every module; events are short names in the past
tense, what varies is a field: `log.info("model_loaded", model=..., seconds=...)`. What a
driver logs through the standard library comes out in the same form.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import msgspec
import structlog
from structlog.contextvars import bound_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from shared.config import LogFormat, LogLevel

__all__ = ["bound", "configure"]

bound = bound_contextvars
"""`with bound(request_id=..., model=...):` adds the fields to every line logged inside, in
this task and those it starts."""

_QUIET = ("aio_pika", "aiormq", "asyncio", "fsspec", "httpcore", "httpx", "s3fs", "urllib3")
"""Their `info` tells the story of each call; what goes wrong is `warning` and more."""


def configure(
    service: str,
    fmt: LogFormat = "auto",
    level: LogLevel = "info",
    *,
    stream: TextIO | None = None,
) -> None:
    """Sets up structlog and the standard library's logging for this process. May be called
    again. Every line bears `service` and the process id."""
    stream = sys.stderr if stream is None else stream
    as_json = fmt == "json" or (fmt == "auto" and not stream.isatty())
    number: int = getattr(logging, level.upper())
    pid = os.getpid()

    def add_origin(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        event.setdefault("pid", pid)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        add_origin,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render = _json_chain() if as_json else _console_chain(stream)
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        # A cached logger would keep its first configuration for ever.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    logging.captureWarnings(capture=True)


def _json_chain() -> list[Processor]:
    return [
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _render_json,
    ]


def _console_chain(stream: TextIO) -> list[Processor]:
    def drop_origin(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.pop("pid", None)
        return event

    return [
        structlog.processors.StackInfoRenderer(),
        drop_origin,
        structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            # The richer ones print local variables, among them URLs with passwords.
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]


def _render_json(_logger: WrappedLogger, _method: str, event: MutableMapping[str, Any]) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=repr).decode()
    except (UnicodeError, TypeError, ValueError, RecursionError):
        # A line that cannot be encoded (half a surrogate pair in a client's text, say) must
        # not turn a log call into an error.
        return json.dumps({str(key): _plain(value) for key, value in event.items()})


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
