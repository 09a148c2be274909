"""What images install agrees with pyproject.toml and constraints.txt; without an index."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
EXTRAS = {
    "gateway": ("gateway", "grpc", "tracing"),
    "placer": ("placer", "tracing"),
    "worker": ("worker", "tracing"),
}
_LOCKED = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+)( ; [^\\]+)? \\$")
_HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def locked(image: str) -> dict[str, str]:
    """Versions by name. Each has hashes, and nothing else is in the file."""
    found: dict[str, str] = {}
    hashes = 1
    for line in (ROOT / "deploy" / "locks" / f"{image}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        if _HASH.match(line):
            hashes += 1
            continue
        match = _LOCKED.match(line)
        assert match, f"{image}: {line!r}"
        assert hashes, f"{image}: what stands before {line!r} has no hash"
        found[canonicalize_name(match["name"])] = match["version"]
        hashes = 0
    assert hashes
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def asked_for(image: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in EXTRAS[image]:
        wanted += project["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(each).name) for each in wanted} - {"torch"}


def closure(names: set[str]) -> set[str]:
    """These and all that they need, by what is installed."""
    environment = {**default_environment(), "extra": ""}
    done: set[str] = set()
    left = set(names)
    while left:
        name = left.pop()
        done.add(name)
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate(environment):
                left |= {canonicalize_name(needed.name)} - done
    return done


@pytest.mark.parametrize("image", EXTRAS)
def test_an_image_installs_what_was_pinned(image):
    """The lock has no version of its own; `deploy/lock` was run since constraints.txt changed."""
    pins = constraints()
    differ = {name: version for name, version in locked(image).items() if pins[name] != version}
    assert not differ, f"run deploy/lock: {differ}"


@pytest.mark.parametrize("image", EXTRAS)
def test_an_image_installs_what_it_asks_for_and_what_that_needs(image):
    """Nothing is missing, which `--require-hashes` would refuse, and nothing is left over."""
    wanted = asked_for(image)
    if image == "worker":
        # torch is not locked, and brings its own; what else this image needs is here in any case.
        wanted = {name for name in wanted if _installed(name)}
    needed, there = closure(wanted), set(locked(image))
    assert needed <= there, f"run deploy/lock: {needed - there}"
    if sys.version_info[:2] == (3, 11):  # the images'; others need less
        assert there - needed <= asked_for(image), f"run deploy/lock: {there - needed}"


def test_the_images_install_from_the_locks():
    """Each stage takes its own file, by hash."""
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    for image in EXTRAS:
        assert f"--require-hashes -r deploy/locks/{image}.txt" in text
    assert "!deploy/locks" in (ROOT / ".dockerignore").read_text().splitlines()
    listed = subprocess.run(
        [sys.executable, "deploy/requirements", "pyproject.toml", "placer"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "starlette" in listed


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
