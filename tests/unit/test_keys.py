"""API keys as the registry keeps them."""

from __future__ import annotations

import hashlib
import re

import pytest

from shared.errors import InvalidRequest, ModelNotFound
from shared.keys import TOKEN, Key, Keys, new_key
from shared.storage import open_storage


@pytest.fixture
def keys(tmp_path):
    return Keys(open_storage(str(tmp_path / "repository")))


def test_a_key_is_kept_without_its_secret(keys, tmp_path):
    """Whoever reads the registry cannot ask in anybody's name."""
    key, token = new_key("acme", ("infer", "push"), note="for tests")
    keys.add(key)
    assert re.fullmatch(TOKEN, token)
    secret = token.rpartition("_")[2]
    (file,) = (tmp_path / "repository" / "keys").iterdir()
    assert secret not in file.read_text()
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert keys.look().keys == {key.id: key}


def test_no_two_keys_have_anything_in_common():
    """Ids and secrets are drawn anew."""
    drawn = {part for _ in range(20) for part in new_key()[1].split("_")[1:]}
    assert len(drawn) == 40


def test_a_revoked_key_stays_as_such(keys):
    """Its file tells when it went; revoking it again changes nothing."""
    key, _ = new_key()
    keys.add(key)
    revoked = keys.revoke(key.id)
    assert revoked.revoked is not None
    assert keys.revoke(key.id) == revoked
    assert keys.look().keys == {key.id: revoked}
    assert (key.state(0.0), revoked.state(0.0)) == ("valid", "revoked")


def test_a_key_ends_at_its_time():
    """Not a moment later."""
    key, _ = new_key(lifetime_s=10.0)
    assert key.expires == key.created + 10
    assert [key.state(key.created + later) for later in (9.9, 10.0)] == ["valid", "expired"]


def test_what_is_no_key_cannot_be_revoked(keys, tmp_path):
    """Nor does the id become a path."""
    with pytest.raises(ModelNotFound, match="no key 0123456789ab"):
        keys.revoke("0123456789ab")
    with pytest.raises(InvalidRequest, match="12 hexadecimal digits"):
        keys.revoke("../tenants/a")


@pytest.mark.parametrize(
    ("tenant", "scopes", "said"),
    [
        ("", (), "one or more of the scopes"),
        ("", ("infer", "infer"), "one or more of the scopes"),
        ("acme", ("admin",), "infer or push"),
        ("acme", ("infer", "metrics"), "infer or push"),
        ("a/b", ("infer",), "tenant's name"),
    ],
)
def test_keys_that_make_no_sense_are_refused(tenant, scopes, said):
    """A tenant's key administrates nothing, since that is everybody's."""
    with pytest.raises(InvalidRequest, match=said):
        new_key(tenant, scopes)


def test_files_that_cannot_be_read_are_left_out_but_count(keys, tmp_path):
    """One damaged file takes nobody's key away; and that there are keys, is still seen."""
    folder = tmp_path / "repository" / "keys"
    folder.mkdir(parents=True)
    key, _ = new_key()
    (folder / f"{key.id}.json").write_bytes(b"{")
    assert keys.look().some
    assert not keys.look().keys
    good, _ = new_key()
    keys.add(good)
    (folder / "0123456789ab.json").write_bytes((folder / f"{good.id}.json").read_bytes())
    assert keys.look().keys == {good.id: good}, "a file under another key's name is no key"


def test_only_what_has_changed_is_read_again(keys, tmp_path):
    """A look costs a listing, however many keys there are."""
    key, _ = new_key()
    keys.add(key)
    first = keys.look().keys[key.id]
    assert keys.look().keys[key.id] is first
    keys.revoke(key.id)
    assert keys.look().keys[key.id] is not first


def test_a_key_of_another_kind_is_refused():
    """Digests and ids have one form each."""
    with pytest.raises(InvalidRequest):
        Key(id="x", sha256="0" * 64, scopes=("infer",), created=0.0)
