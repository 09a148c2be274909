"""Repositories of both kinds, for whatever reads or writes them."""

from __future__ import annotations

import uuid

import pytest

from shared.repository import Repository


@pytest.fixture(params=["directory", "url"])
def url(request, tmp_path):
    if request.param == "directory":
        return str(tmp_path / "repository")
    return f"memory://{uuid.uuid4().hex}/repository"


@pytest.fixture
def repository(url):
    return Repository(url)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "repository"


@pytest.fixture
def local(root):
    return Repository(str(root))
