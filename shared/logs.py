"""Logs: one event per line, JSON for machines or columns for people, always on stderr.

`log = structlog.get_logger(__name__)` in every module; events are short names in the past
tense, what varies is a field: `log.info("model_loaded", model=..., seconds=...)`. What a
driver logs through the standard library comes out in the same form.

What a line may not hold is taken out on its way, whoever wrote it: passwords in URLs and those of
our own settings, keys, bytes, and objects that are no plain values (requests, messages, tensors).
"""

from __future__ import annotations

import io
import json
import logging
import numbers
import os
import re
import sys
from collections.abc import MutableMapping
from itertools import islice
from pathlib import PurePath
from typing import Any, Final, TextIO

import msgspec
import structlog
from structlog.contextvars import bound_contextvars
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from shared.config import LogFormat, LogLevel, redact, secrets

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
        _clean,
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


_KEYS: Final = re.compile(r"(_[0-9a-f]{12}_)[0-9a-f]{16,}|(Bearer\s+)\S+", re.IGNORECASE)
"""API keys (shared/keys.py), after their ids; and what else is shown as one."""
_SECRET_NAMES: Final = frozenset({
    "api_key", "apikey", "authorization", "credential", "credentials", "password", "secret",
    "token",
})  # fmt: skip
_VALUE_CHARS: Final = 2_000
_TRACEBACK_CHARS: Final = 20_000
_ITEMS: Final = 50
_DEPTH: Final = 3


def _clean(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if key == "exc_info" or key.startswith("_"):
            continue  # becomes text further on; the others are structlog's own
        event[key] = "***" if key in _SECRET_NAMES else _cleaned(value)
    return event


def _cleaned(value: object, depth: int = 0) -> object:
    """Plain values as they are, but for secrets; of anything else what kind of thing it is."""
    if isinstance(value, str):
        return _text(value, _VALUE_CHARS)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, numbers.Real):  # numpy's
        return float(value)
    if isinstance(value, BaseException):
        return _text(f"{type(value).__name__}: {value}", _VALUE_CHARS)
    if depth < _DEPTH:
        if isinstance(value, dict):
            items = islice(value.items(), _ITEMS)
            return {
                _text(str(key), _VALUE_CHARS): "***"
                if key in _SECRET_NAMES
                else _cleaned(each, depth + 1)
                for key, each in items
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [_cleaned(each, depth + 1) for each in islice(value, _ITEMS)]
    if isinstance(value, PurePath):
        return _text(str(value), _VALUE_CHARS)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    return f"<{type(value).__name__}>"


def _text(text: str, most: int) -> str:
    if len(text) > most:
        text = f"{text[:most]}… ({len(text)} characters)"
    if "://" in text:
        text = redact(text)
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, "***")
    return _KEYS.sub(lambda key: f"{key[1] or key[2]}***", text)


def _clean_traceback(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if isinstance(told := event.get("exception"), str):
        event["exception"] = _text(told, _TRACEBACK_CHARS)
    return event


def _json_chain() -> list[Processor]:
    return [
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _clean_traceback,
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
            exception_formatter=_plain_traceback,
        ),
    ]


def _plain_traceback(stream: TextIO, error: ExcInfo) -> None:
    told = io.StringIO()
    structlog.dev.plain_traceback(told, error)
    stream.write(_text(told.getvalue(), _TRACEBACK_CHARS))


def _render_json(_logger: WrappedLogger, _method: str, event: MutableMapping[str, Any]) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=repr).decode()
    except (UnicodeError, TypeError, ValueError, RecursionError):
        # A line that cannot be encoded (half a surrogate pair in a client's text, say) must
        # not turn a log call into an error.
        return json.dumps({str(key): _plain(value) for key, value in event.items()})


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
