"""TLS by files: contexts of servers and clients, taken anew when the files are replaced.

Python's own defaults for versions, ciphers and verification: TLS 1.2 or newer, host names checked.
Nothing here opens a socket or knows a setting's value; `shared.config` says which file is what.
"""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

log = structlog.get_logger(__name__)

HANDSHAKE_TIMEOUT_S: Final = 10.0
"""A connection that is not through by then is closed: as long as the head of a request may take."""

Role = Literal["server", "client"]


class TlsError(ValueError):
    """A file of ours cannot be used. The message is one line that names setting and file."""


class ClientTls(msgspec.Struct, frozen=True, kw_only=True):
    """How one kind of server is verified, and what we show it of ourselves. All empty: the
    system's certificate authorities, and nothing."""

    setting: str = "ROOST"
    """What the names of the settings begin with, for messages."""
    ca_file: str = ""
    """Who may sign the server's certificate, in PEM; instead of the system's authorities."""
    cert_file: str = ""
    """Our certificate and its chain, for servers that ask for one."""
    key_file: str = ""
    """Its key, not encrypted; empty where `cert_file` has it."""

    def __bool__(self) -> bool:
        return bool(self.ca_file or self.cert_file or self.key_file)

    def context(self) -> ssl.SSLContext:
        """A new context, from the files as they are now. Raises `TlsError`."""
        if self.key_file and not self.cert_file:
            raise TlsError(f"{self.setting}_KEY_FILE is set, and {self.setting}_CERT_FILE is not")
        context = _trusting(ssl.PROTOCOL_TLS_CLIENT, f"{self.setting}_CA_FILE", self.ca_file)
        if not self.ca_file:
            context.load_default_certs()
        if self.cert_file:
            _identify(context, self.setting, self.cert_file, self.key_file)
            _try_out(self.setting, self.cert_file, self.key_file, "client")
        return context


SYSTEM: Final = ClientTls()


class ServerTls(msgspec.Struct, frozen=True, kw_only=True):
    """What a server shows its clients, and whom it lets in."""

    setting: str = "ROOST_TLS"
    cert_file: str
    """The certificate, then its chain, in PEM."""
    key_file: str = ""
    """Its key, not encrypted; empty where `cert_file` has it."""
    client_ca_file: str = ""
    """Who may sign the certificates of clients, which then must have one. Empty: none is asked
    for."""

    def context(self) -> ssl.SSLContext:
        """A new context, from the files as they are now. Raises `TlsError`."""
        name = f"{self.setting}_CLIENT_CA_FILE"
        context = _trusting(ssl.PROTOCOL_TLS_SERVER, name, self.client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED if self.client_ca_file else ssl.CERT_NONE
        _identify(context, self.setting, self.cert_file, self.key_file)
        return context

    def files(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.cert_file, self.key_file, self.client_ca_file)))


class Identity:
    """What a server is at the moment. Each handshake asks, so that a certificate which was renewed
    is shown from the next connection on; connections that exist go on with theirs.

    Files that cannot be used (half of a pair is written, a certificate has run out) change nothing
    but a line in the log. Asking reads the files, which takes a few percent of a handshake; their
    dates would not do, since two writes in one tick of the kernel's clock bear the same.
    """

    def __init__(self, files: ServerTls) -> None:
        """Raises `TlsError`."""
        self._files = files
        self._seen = self._contents()
        self.context, self.pem = self._load()

    def current(self) -> ssl.SSLContext:
        """The context for a handshake that begins now."""
        self.renew()
        return self.context

    def renew(self) -> bool:
        """Takes the files anew if they changed and can be used; says whether it did."""
        contents = self._contents()
        if contents == self._seen:
            return False
        # Whatever comes of it, these are not tried again: the log would repeat itself.
        self._seen = contents
        try:
            context, pem = self._load()
        except TlsError as error:
            log.warning("tls_not_renewed", error=str(error))
            return False
        if self._contents() != contents:
            self._seen = None  # written to meanwhile: the next one looks again
            return False
        self.context, self.pem = context, pem
        return True

    def _load(self) -> tuple[ssl.SSLContext, Pem]:
        files = self._files
        context = files.context()
        until = _try_out(files.setting, files.cert_file, files.key_file, "server")
        pem = Pem(
            key=_read(f"{files.setting}_KEY_FILE", files.key_file or files.cert_file),
            chain=_read(f"{files.setting}_CERT_FILE", files.cert_file),
            client_ca=_read(f"{files.setting}_CLIENT_CA_FILE", files.client_ca_file)
            if files.client_ca_file
            else None,
        )
        days = (until - time.time()) / 86400
        log.info("tls_certificate", file=files.cert_file, days_left=round(days, 1))
        return context, pem

    def _contents(self) -> tuple[bytes, ...] | None:
        """None while a file is missing: a renewal may remove before it writes."""
        try:
            return tuple(Path(file).read_bytes() for file in self._files.files())
        except OSError:
            return None


class Pem(msgspec.Struct, frozen=True):
    """The same files as bytes, for who takes no context (gRPC)."""

    key: bytes
    chain: bytes
    client_ca: bytes | None


def explain(error: BaseException) -> str:
    """What a failed connection says of TLS, in words that tell what to do; empty when it is not
    about TLS."""
    seen: BaseException | None = error
    been: set[int] = set()  # aiormq raises one error again and again: chains may be rings
    while seen is not None and not isinstance(seen, ssl.SSLError):
        been.add(id(seen))
        seen = seen.__cause__ or seen.__context__
        if id(seen) in been:
            return ""
    if seen is None:
        return ""
    if isinstance(seen, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {seen.verify_message}"
    reason = (seen.reason or "").upper()
    for part, said in _REASONS.items():
        if part in reason:
            return said
    return f"TLS: {seen.reason or seen}"


_REASONS: Final = {
    "WRONG_VERSION_NUMBER": "no TLS is spoken there",
    "RECORD_LAYER_FAILURE": "no TLS is spoken there",
    "CERTIFICATE_REQUIRED": "it asks for a client certificate (..._CERT_FILE)",
    "HANDSHAKE_FAILURE": "it refuses the handshake; it may ask for a client certificate "
    "(..._CERT_FILE)",
    "UNKNOWN_CA": "it does not know who signed our client certificate (..._CERT_FILE)",
    "CERTIFICATE_EXPIRED": "our client certificate has expired (..._CERT_FILE)",
    "BAD_CERTIFICATE": "it refuses our client certificate (..._CERT_FILE)",
    "HTTP_REQUEST": "plain HTTP came where TLS is spoken",
}


def _trusting(protocol: int, setting: str, ca_file: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    # Python's own; said here since OpenSSL's configuration on a machine may be laxer.
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    if ca_file:
        _read(setting, ca_file)
        try:
            context.load_verify_locations(ca_file)
        except (ssl.SSLError, OSError):
            raise TlsError(f"{setting}: {ca_file} holds no certificate in PEM") from None
    return context


def _identify(context: ssl.SSLContext, setting: str, cert_file: str, key_file: str) -> None:
    _read(f"{setting}_CERT_FILE", cert_file)
    if key_file:
        _read(f"{setting}_KEY_FILE", key_file)
    key = f"{setting}_KEY_FILE: {key_file}" if key_file else f"{setting}_CERT_FILE: {cert_file}"

    def no_password() -> str:
        # Without this OpenSSL would ask on the terminal.
        raise TlsError(f"{key} is encrypted; Roost takes a key that is not, readable by it alone")

    try:
        context.load_cert_chain(cert_file, key_file or None, password=no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            said = f"{key} is not the key of {setting}_CERT_FILE {cert_file}"
        elif _has_certificate(cert_file):
            said = f"{key} holds no key in PEM that can be used"
        else:
            said = f"{setting}_CERT_FILE: {cert_file} holds no certificate in PEM"
        raise TlsError(said) from None


def _has_certificate(cert_file: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert_file)
    except (ssl.SSLError, OSError):
        return False
    return True


def _read(setting: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise TlsError(f"{setting}: cannot read {file}: {error.strerror}") from None


def _try_out(setting: str, cert_file: str, key_file: str, role: Role) -> float:
    """Until when the certificate is valid, in Unix time. Raises `TlsError` when it is not now, or
    not for this role.

    By a handshake with itself in memory: the standard library verifies certificates nowhere else,
    and reads their dates nowhere else in public.
    """
    shows = ssl.SSLContext(_PROTOCOLS[role])
    checks = ssl.SSLContext(_PROTOCOLS["client" if role == "server" else "server"])
    checks.check_hostname = shows.check_hostname = False
    shows.verify_mode = ssl.CERT_NONE
    for context in (shows, checks):
        if context is shows or role == "client":  # a server shows one in any case
            _identify(context, setting, cert_file, key_file)
    checks.verify_mode = ssl.CERT_REQUIRED
    checks.load_verify_locations(cert_file)
    # It vouches for itself: who signed it is the other side's question.
    checks.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    shown = shows.wrap_bio(*_ends(role, to_server, to_client), server_side=role == "server")
    checked = checks.wrap_bio(
        *_ends("client" if role == "server" else "server", to_server, to_client),
        server_side=role == "client",
    )
    waiting = [shown, checked]
    for _ in range(10):
        for side in tuple(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                raise TlsError(
                    f"{setting}_CERT_FILE: {cert_file} cannot be used by a {role}: "
                    f"{error.verify_message}"
                ) from None
            except ssl.SSLError as error:
                raise TlsError(f"{setting}_CERT_FILE: {cert_file}: {error.reason}") from None
    certificate = checked.getpeercert()
    assert certificate, "the handshake is through, and it was required"
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


_PROTOCOLS: Final = {"server": ssl.PROTOCOL_TLS_SERVER, "client": ssl.PROTOCOL_TLS_CLIENT}


def _ends(
    role: Role, to_server: ssl.MemoryBIO, to_client: ssl.MemoryBIO
) -> tuple[ssl.MemoryBIO, ssl.MemoryBIO]:
    """What a side reads from, and writes to."""
    return (to_server, to_client) if role == "server" else (to_client, to_server)
