"""TLS by files: what can be used, what is said of the rest, and renewal."""

from __future__ import annotations

import os
import shutil
import ssl
from pathlib import Path

import pytest
import structlog
from cryptography.hazmat.primitives import serialization

from services.gateway.config import GatewayConfig
from shared import tls
from shared.config import ConfigError, load
from shared.tls import ClientTls, Identity, ServerTls, TlsError
from tests.authority import Authority


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path)


def refusal(**files: str) -> str:
    with pytest.raises(TlsError) as caught:
        Identity(ServerTls(**files))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_python_calls_safe_is_what_is_spoken(authority):
    """TLS 1.2 at least; a client verifies the certificate and the host's name."""
    server, client = authority.server().context(), authority.client().context()
    for context in (server, client):
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert client.verify_mode is ssl.CERT_REQUIRED
    assert client.check_hostname
    assert server.verify_mode is ssl.CERT_NONE
    asks = authority.server(clients=authority.ca_file).context()
    assert asks.verify_mode is ssl.CERT_REQUIRED


def test_a_file_that_cannot_be_read_is_named_with_its_setting(authority, tmp_path):
    """The one line says which setting, which file, and what the system said."""
    cert, key = authority.issue()
    missing = str(tmp_path / "none.pem")
    gone = f"cannot read {missing}: No such file or directory"
    assert refusal(cert_file=missing, key_file=key) == f"ROOST_TLS_CERT_FILE: {gone}"
    assert refusal(cert_file=cert, key_file=missing) == f"ROOST_TLS_KEY_FILE: {gone}"
    told = refusal(cert_file=cert, key_file=key, client_ca_file=missing)
    assert told == f"ROOST_TLS_CLIENT_CA_FILE: {gone}"
    folder = refusal(cert_file=str(tmp_path), key_file=key)
    assert folder == f"ROOST_TLS_CERT_FILE: cannot read {tmp_path}: Is a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_key_that_others_own_is_refused(authority):
    """A key that this user may not read is told as such."""
    cert, key = authority.issue()
    Path(key).chmod(0)
    assert refusal(cert_file=cert, key_file=key).endswith(f"cannot read {key}: Permission denied")


def test_files_with_something_else_in_them_are_told_apart(authority):
    """No certificate, no key, another's key, and a key that is encrypted."""
    cert, key = authority.issue()
    _, other = authority.issue("other")
    assert refusal(cert_file=key, key_file=key) == (
        f"ROOST_TLS_CERT_FILE: {key} holds no certificate in PEM"
    )
    assert refusal(cert_file=cert, key_file=cert) == (
        f"ROOST_TLS_KEY_FILE: {cert} holds no key in PEM that can be used"
    )
    assert refusal(cert_file=cert, key_file=other) == (
        f"ROOST_TLS_KEY_FILE: {other} is not the key of ROOST_TLS_CERT_FILE {cert}"
    )
    assert refusal(cert_file=cert, key_file=key, client_ca_file=key) == (
        f"ROOST_TLS_CLIENT_CA_FILE: {key} holds no certificate in PEM"
    )
    plain = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    locked = plain.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    Path(other).write_bytes(locked)
    assert "is encrypted" in refusal(cert_file=cert, key_file=other)


def test_a_certificate_that_ran_out_is_refused(authority):
    """By a server before it listens, and by a client before it asks."""
    cert, key = authority.issue(expired=True)
    assert refusal(cert_file=cert, key_file=key) == (
        f"ROOST_TLS_CERT_FILE: {cert} cannot be used by a server: certificate has expired"
    )
    with pytest.raises(TlsError, match="cannot be used by a client: certificate has expired"):
        ClientTls(cert_file=cert, key_file=key).context()


def test_a_key_without_a_certificate_is_no_identity(authority):
    """Half a pair is a mistake, not a client without one."""
    _, key = authority.issue()
    with pytest.raises(TlsError, match="_KEY_FILE is set, and ROOST_CERT_FILE is not"):
        ClientTls(key_file=key).context()


def test_one_file_may_hold_certificate_and_key(authority, tmp_path):
    """As some tools write it."""
    cert, key = authority.issue()
    both = tmp_path / "both.pem"
    both.write_bytes(Path(key).read_bytes() + Path(cert).read_bytes())
    Identity(ServerTls(cert_file=str(both)))


def test_a_renewed_pair_is_taken_and_a_half_written_one_is_not(authority):
    """The context changes when both files fit each other, with one line in the log until then."""
    files = authority.server()
    identity = Identity(files)
    before = identity.current()
    assert identity.current() is before
    cert, key = authority.issue("new")
    with structlog.testing.capture_logs() as logs:
        shutil.copy(cert, files.cert_file)
        assert identity.current() is before
        assert identity.current() is before
        shutil.copy(key, files.key_file)
        assert identity.current() is not before
    assert [each["event"] for each in logs] == ["tls_not_renewed", "tls_certificate"]


def test_neither_a_missing_nor_an_expired_file_ends_what_is_served(authority):
    """What was shown goes on being shown, and the log says why."""
    files = authority.server()
    identity = Identity(files)
    before = identity.current()
    with structlog.testing.capture_logs() as logs:
        Path(files.cert_file).unlink()
        assert identity.current() is before
        authority.issue(expired=True)
        assert identity.current() is before
        authority.issue()
        assert identity.current() is not before
    events = [each["event"] for each in logs]
    assert events == ["tls_not_renewed", "tls_not_renewed", "tls_certificate"]
    assert "certificate has expired" in logs[1]["error"]


def test_a_linked_file_is_renewed_by_its_link(authority, tmp_path):
    """As secrets are mounted into containers: a symbolic link changes, nothing is written."""
    old, old_key = authority.issue("old")
    link, link_key = tmp_path / "tls.crt", tmp_path / "tls.key"
    link.symlink_to(old)
    link_key.symlink_to(old_key)
    identity = Identity(ServerTls(cert_file=str(link), key_file=str(link_key)))
    before = identity.current()
    new, new_key = authority.issue("new")
    for path, target in ((link, new), (link_key, new_key)):
        path.unlink()
        path.symlink_to(target)
    assert identity.current() is not before


def configured(**environ: str) -> GatewayConfig:
    return load(GatewayConfig, "GATEWAY", environ)


def test_a_service_does_not_start_with_files_that_cannot_be_used(authority, tmp_path):
    """Each of its settings is looked at before anything is opened."""
    cert, key = authority.issue()
    other = str(tmp_path / "none.pem")
    for variables in (
        {"ROOST_TLS_CERT_FILE": other, "ROOST_TLS_KEY_FILE": key},
        {"ROOST_AMQP_URL": "amqps://h/", "ROOST_AMQP_CA_FILE": other},
        {"ROOST_REDIS_URL": "rediss://h/", "ROOST_REDIS_CERT_FILE": cert,
         "ROOST_REDIS_KEY_FILE": other},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"cannot read {other}"):
            configured(**variables)
    good = configured(
        ROOST_TLS_CERT_FILE=cert, ROOST_TLS_KEY_FILE=key,
        ROOST_AMQP_URL="amqps://h/", ROOST_AMQP_CA_FILE=authority.ca_file,
    )  # fmt: skip
    assert good.tls == ServerTls(cert_file=cert, key_file=key)
    assert good.amqp_tls.ca_file == authority.ca_file
    assert configured().tls is None


def test_files_that_would_be_ignored_are_refused(authority):
    """Whoever names a CA does not want plain text, and whoever names a key wants to be served."""
    with pytest.raises(ConfigError, match="ROOST_AMQP_URL is not amqps://"):
        configured(ROOST_AMQP_CA_FILE=authority.ca_file)
    with pytest.raises(ConfigError, match="ROOST_REDIS_URL is not rediss://"):
        configured(ROOST_REDIS_CA_FILE=authority.ca_file)
    with pytest.raises(ConfigError, match="_CERT_FILE is not"):
        configured(ROOST_TLS_CLIENT_CA_FILE=authority.ca_file)


def test_errors_that_go_round_in_a_ring_are_not_followed_for_ever():
    """aiormq raises one error again and again, so that it is its own cause's cause."""
    first, second = ConnectionResetError(), ConnectionAbortedError()
    first.__cause__, second.__cause__ = second, first
    assert not tls.explain(first)


def test_what_is_not_about_tls_is_not_explained_by_it():
    """The error's own words stand then."""
    assert not tls.explain(ConnectionRefusedError(111, "Connection refused"))
    assert not tls.explain(TimeoutError())
