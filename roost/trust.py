"""Whom the client and the `roost` command believe to be the gateway or the placer."""

from __future__ import annotations

import argparse
import os
import ssl

import httpx

from shared.errors import InvalidRequest
from shared.tls import ClientTls, TlsError, explain


def verify(
    url: str, ca_file: str | None = None, cert_file: str | None = None, key_file: str | None = None
) -> ssl.SSLContext | bool:
    """Httpx's `verify` for a URL. What is not given comes from `ROOST_CA_FILE`, `ROOST_CERT_FILE`
    and `ROOST_KEY_FILE`; without a CA file the system's authorities count. Raises
    `InvalidRequest` for files that cannot be used."""
    if not url.startswith("https:"):
        return False  # there is nothing to verify, and making a context takes 20 ms
    files = ClientTls(
        ca_file=_or_environment(ca_file, "ROOST_CA_FILE"),
        cert_file=_or_environment(cert_file, "ROOST_CERT_FILE"),
        key_file=_or_environment(key_file, "ROOST_KEY_FILE"),
    )
    try:
        return files.context()
    except TlsError as error:
        raise InvalidRequest(str(error)) from None


def why(url: str, error: Exception) -> str:
    """In one line why nobody answered there."""
    said = explain(error) or str(error) or type(error).__name__
    if isinstance(error, httpx.RemoteProtocolError) and url.startswith("http:"):
        said += " (if TLS is spoken there, the URL begins with https://)"
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) and url.startswith("https:"):
        # With TLS 1.3 a client is through before the server has looked at its certificate.
        said += " (it may ask for a client certificate: $ROOST_CERT_FILE)"
    return said


def add_ca_file(parser: argparse.ArgumentParser) -> None:
    """The option beside every URL."""
    parser.add_argument(
        "--ca-file",
        metavar="FILE",
        help="who may sign the certificate of an https:// URL (default $ROOST_CA_FILE, or the "
        "system's authorities)",
    )


def add_gateway(parser: argparse.ArgumentParser, url: str) -> None:
    """Which gateway, and whom to believe to be it."""
    parser.add_argument("--url", default=url, help=f"the gateway (default {url}, or $ROOST_URL)")
    add_ca_file(parser)


def note_options(arguments: argparse.Namespace) -> None:
    """What was said for one command, where `verify` looks."""
    if getattr(arguments, "ca_file", None):
        os.environ["ROOST_CA_FILE"] = arguments.ca_file


def _or_environment(given: str | None, variable: str) -> str:
    return os.environ.get(variable, "") if given is None else given
