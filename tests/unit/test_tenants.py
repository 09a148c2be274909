"""What tenants may take, as the registry keeps it."""

from __future__ import annotations

import pytest

from shared.errors import InvalidRequest
from shared.storage import open_storage
from shared.tenants import Quota, Tenants, check_tenant


@pytest.fixture
def tenants(tmp_path):
    return Tenants(open_storage(str(tmp_path / "repository")))


def test_what_is_said_of_a_tenant_can_be_read_replaced_and_removed(tenants):
    """The last word counts, and without a word a tenant has no entry."""
    tenants.put("nlp", Quota(requests_per_s=10.0))
    tenants.put("nlp", Quota(share=2.5, device_bytes=10**9))
    tenants.put("vision", Quota())
    assert tenants.quotas() == {"nlp": Quota(share=2.5, device_bytes=10**9), "vision": Quota()}
    assert tenants.remove("nlp")
    assert not tenants.remove("nlp")
    assert tenants.quotas() == {"vision": Quota()}


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests_per_s": 0.0},
        {"requests_per_s": float("inf")},
        {"requests_per_s": float("nan")},
        {"concurrency": 0},
        {"device_bytes": -1},
        {"request_bytes": 2**63},
        {"share": 0.0},
        {"share": float("nan")},
    ],
)
def test_a_bound_that_bounds_nothing_is_refused(wrong):
    """Zero, less, and what is no number are mistakes, and said to be."""
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        Quota(**wrong)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a..b", "-a", "ä", "a" * 65, "a b"])
def test_a_name_that_is_no_file_name_is_refused(name):
    """Names become paths and labels."""
    with pytest.raises(InvalidRequest, match="tenant's name"):
        check_tenant(name)


def test_files_that_cannot_be_read_are_left_out(tenants, tmp_path):
    """One damaged file does not take the others' bounds away."""
    tenants.put("good", Quota(share=3.0))
    folder = tmp_path / "repository" / "tenants"
    (folder / "bad.json").write_bytes(b"{")
    (folder / "worse.json").write_bytes(b'{"share": -1}')
    (folder / "not a tenant.json").write_bytes(b"{}")
    assert tenants.quotas() == {"good": Quota(share=3.0)}
