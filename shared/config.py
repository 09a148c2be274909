"""Settings from the environment: `ROOST_*` for all services, `ROOST_<SERVICE>_*` for one.

They are read once, into a frozen Struct. A variable that nobody knows is an error, and the
error names the nearest one that exists: a setting with a typing mistake must not be ignored.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec

from shared.tls import ClientTls, Identity, ServerTls, TlsError

LogFormat = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]

OTHER_PREFIXES: Final = ("GATEWAY", "PLACER", "WORKER", "TEST", "BENCH")
"""`ROOST_<one of these>_…` concerns somebody else: the same environment may serve several."""

CLIENT_VARIABLES: Final = (
    "ROOST_URL", "ROOST_PLACER_URL", "ROOST_API_KEY",
    "ROOST_CA_FILE", "ROOST_CERT_FILE", "ROOST_KEY_FILE",
)  # fmt: skip
"""What the `roost` command reads to find a running stack; no service's setting."""


class ConfigError(ValueError):
    """A setting is unknown or wrong. The message is one line that names the variable."""


class CommonConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every service is told; each has its own subclass with more."""

    amqp_url: str = "amqp://guest:guest@127.0.0.1:5672/"
    """What a RabbitMQ fresh from its package listens on."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """What a Redis fresh from its package listens on."""
    repository_url: str = ".roost/repository"
    """A folder, or any fsspec URL (`s3://bucket/models`). Relative, so that a first try leaves
    nothing outside its own folder."""
    data_dir: str = ".roost"
    """For what a service may lose: caches of model files, sockets, engine logs."""
    log_format: LogFormat = "auto"
    """`auto`: lines for people on a terminal, JSON lines anywhere else."""
    log_level: LogLevel = "info"
    """`info` is a handful of lines per change, none per request."""
    tracing: bool = False
    """Spans of every request to an OpenTelemetry collector, as the standard `OTEL_*` variables say
    (docs/tracing.md). Needs `roost[tracing]`."""
    tls_cert_file: str = ""
    """What this service shows the clients of its HTTP and gRPC: the certificate, then its chain, in
    PEM. A file that is replaced is taken from the next connection on. Empty: plain text."""
    tls_key_file: str = ""
    """Its key, not encrypted. Empty: `tls_cert_file` has it too."""
    tls_client_ca_file: str = ""
    """Who may sign the certificates of clients, which then must show one. Empty: none is asked
    for."""
    amqp_ca_file: str = ""
    """Who may sign RabbitMQ's certificate, its management's too, with `amqps://` (`https://`).
    Empty: the system's certificate authorities."""
    amqp_cert_file: str = ""
    """What is shown to a RabbitMQ that asks for client certificates; user and password stay."""
    amqp_key_file: str = ""
    redis_ca_file: str = ""
    """The same for Redis, with `rediss://`."""
    redis_cert_file: str = ""
    redis_key_file: str = ""

    @property
    def tls(self) -> ServerTls | None:
        """How this service's own ports are served; None: in plain text."""
        if not self.tls_cert_file:
            return None
        return ServerTls(
            cert_file=self.tls_cert_file,
            key_file=self.tls_key_file,
            client_ca_file=self.tls_client_ca_file,
        )

    @property
    def amqp_tls(self) -> ClientTls:
        return ClientTls(
            setting="ROOST_AMQP",
            ca_file=self.amqp_ca_file,
            cert_file=self.amqp_cert_file,
            key_file=self.amqp_key_file,
        )

    @property
    def redis_tls(self) -> ClientTls:
        return ClientTls(
            setting="ROOST_REDIS",
            ca_file=self.redis_ca_file,
            cert_file=self.redis_cert_file,
            key_file=self.redis_key_file,
        )


ConfigT = TypeVar("ConfigT", bound=CommonConfig)


def load(
    cls: type[ConfigT],
    prefix: str,
    environ: Mapping[str, str] | None = None,
    **overrides: object,
) -> ConfigT:
    """Builds `cls` from the environment: field `linger_s` of the prefix `GATEWAY` comes from
    `ROOST_GATEWAY_LINGER_S`, the fields of `CommonConfig` from `ROOST_<FIELD>`.

    `overrides` are values by field name that win over the environment. An empty variable
    counts as not set. Raises `ConfigError`.
    """
    environ = os.environ if environ is None else environ
    own = f"ROOST_{prefix.upper()}_"
    common = set(CommonConfig.__struct_fields__)
    fields = {
        (f"ROOST_{field.name.upper()}" if field.name in common else own + field.name.upper()): field
        for field in msgspec.structs.fields(cls)
    }
    _refuse_unknown(environ, own, list(fields))
    values: dict[str, Any] = {}
    for variable, field in fields.items():
        if field.name in overrides:
            values[field.name] = overrides.pop(field.name)
        elif environ.get(variable, ""):
            values[field.name] = _parse(variable, environ[variable], field.type)
        elif field.required:
            raise ConfigError(f"{variable} is not set, and has no default")
    if overrides:
        raise ConfigError(f"{cls.__name__} has no {', '.join(sorted(overrides))}")
    config = cls(**values)
    _note_secrets(msgspec.structs.asdict(config))
    _check_tls(config)
    return config


def load_or_exit(cls: type[ConfigT], prefix: str) -> ConfigT:
    """As `load`, for a program's first line: a mistake ends it with one line and status 2."""
    try:
        return load(cls, prefix)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None


def _check_tls(config: CommonConfig) -> None:
    """Raises `ConfigError` for files that cannot be used, and for those that would be ignored:
    whoever names a certificate must not be served without."""
    for url, files in ((config.amqp_url, config.amqp_tls), (config.redis_url, config.redis_tls)):
        scheme = url.partition("://")[0]
        if files and scheme not in {"amqps", "rediss"}:
            raise ConfigError(
                f"{files.setting}_CA_FILE or _CERT_FILE is set, and {files.setting}_URL is not "
                f"{scheme}s://: nothing would be encrypted"
            )
    server = config.tls
    if server is None and (config.tls_key_file or config.tls_client_ca_file):
        raise ConfigError("ROOST_TLS_KEY_FILE or _CLIENT_CA_FILE is set, and _CERT_FILE is not")
    try:
        for files in filter(None, (config.amqp_tls, config.redis_tls)):
            files.context()
        if server is not None:
            Identity(server)
    except TlsError as error:
        raise ConfigError(str(error)) from None


def describe(config: CommonConfig) -> dict[str, object]:
    """All settings, fit for a log line: without the passwords in URLs."""
    values = msgspec.structs.asdict(config)
    return {
        name: redact(value) if name.endswith("_url") and isinstance(value, str) else value
        for name, value in values.items()
    }


_PASSWORD: Final = re.compile(r"(://[^:/@\s]*):[^\s'\"]*@")
_OPTION: Final = re.compile(
    r"([?&][^=&\s]*(?:key|token|secret|passw|credential|signature)[^=&\s]*)=[^&#\s'\"]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text with no password in its URLs: not between user and host, were it written with an
    `@` or a `/`, nor among their options."""
    return _OPTION.sub(r"\1=***", _PASSWORD.sub(r"\1:***@", text))


secrets: Final[set[str]] = set()
"""Passwords in the URLs of this process's settings. Whatever quotes one in its own way (a driver's
error, say) is logged without (shared/logs.py)."""
_SECRET_CHARS: Final = 6
"""Shorter ones, `guest` among them, would be found in other words."""


def _note_secrets(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if not name.endswith("_url") or not isinstance(value, str):
            continue
        with contextlib.suppress(ValueError):
            password = urlsplit(value).password or ""
            for each in (password, unquote(password)):
                if len(each) >= _SECRET_CHARS:
                    secrets.add(each)


def _parse(variable: str, text: str, kind: Any) -> Any:
    if kind is Path:
        return Path(text)
    value: Any = text
    if text[:1] in "[{" and kind is not str:
        try:
            value = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{variable}: not JSON: {error}") from None
    elif getattr(kind, "__origin__", None) in {tuple, list, set, frozenset}:
        value = [part.strip() for part in text.split(",") if part.strip()]
    try:
        parsed = msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        shown = redact(text) if "://" in text else text
        raise ConfigError(f"{variable}={shown!r}: {error}{_kubernetes_hint(text)}") from None
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise ConfigError(f"{variable}={text!r}: Expected a finite number")
    return parsed


def _refuse_unknown(environ: Mapping[str, str], own: str, known: list[str]) -> None:
    others = tuple(f"ROOST_{name}_" for name in OTHER_PREFIXES)
    for variable in sorted(environ):
        if not variable.startswith("ROOST_") or variable in (*known, *CLIENT_VARIABLES):
            continue
        if variable.startswith(others) and not variable.startswith(own):
            continue
        near = difflib.get_close_matches(variable, known, n=1, cutoff=0.0)
        raise ConfigError(
            f"{variable} is not a setting; the nearest is {near[0]}"
            f"{_kubernetes_hint(environ[variable], variable)}"
        )


def _kubernetes_hint(value: str, variable: str = "") -> str:
    """Kubernetes puts `ROOST_GATEWAY_PORT=tcp://…` and its kin into every container beside a
    Service of the name `roost-gateway`."""
    if value.startswith("tcp://") or re.search(r"_SERVICE_(HOST|PORT)|_PORT_\d+_TCP", variable):
        return " (it looks like Kubernetes' own: set enableServiceLinks: false in the pod)"
    return ""
