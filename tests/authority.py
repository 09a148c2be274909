"""A certificate authority that lives as long as a test."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import trustme

from shared.tls import ClientTls, ServerTls

_LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


class Authority:
    """Issues certificates as pairs of files in a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self._ca = trustme.CA()
        self.ca_file = str(folder / f"{name}.pem")
        self._ca.cert_pem.write_to_path(self.ca_file)

    def issue(self, name: str = "server", *hosts: str, expired: bool = False) -> tuple[str, str]:
        """Certificate (with its chain) and key; a pair of the same name is replaced. Good for
        servers of these hosts, and for clients."""
        span = {"not_before": _LONG_AGO, "not_after": _LONG_AGO} if expired else {}
        made = self._ca.issue_cert(*(hosts or ("localhost", "127.0.0.1")), **span)
        cert, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        made.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
        return str(cert), str(key)

    def server(self, name: str = "server", *hosts: str, clients: str = "") -> ServerTls:
        """A server's files; `clients`: the CA file for those that it lets in."""
        cert, key = self.issue(name, *hosts)
        return ServerTls(cert_file=cert, key_file=key, client_ca_file=clients)

    def client(self, name: str = "") -> ClientTls:
        """Trusts this authority; with a name it has a certificate as well."""
        cert, key = self.issue(name, "client.test") if name else ("", "")
        return ClientTls(setting="ROOST_AMQP", ca_file=self.ca_file, cert_file=cert, key_file=key)
