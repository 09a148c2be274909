"""What a confined process can still do, in a real one: as the tests' user and, where they run as
root, as a user without any right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="confinement is Linux's")

ROOT = Path(__file__).parents[3]
NOBODY = 65534

ALLOWED = (
    "write to scratch", "rename in scratch", "read a model", "read its own figures",
    "reset its own peak", "name a thread", "start a thread", "pin a thread",
    "raise a signal", "a pipe", "memory by descriptor", "no capabilities",
)  # fmt: skip
NO_FILE = ("EACCES", "EROFS", "EPERM")
FORBIDDEN = {
    "write beside a model": NO_FILE,
    "write over a model": NO_FILE,
    "delete a model": NO_FILE,
    "write elsewhere": NO_FILE,
    "write to the temporary folder": NO_FILE,
    "write over its code": NO_FILE,
    "read a secret": ("EACCES",),
    "read a secret in a thread": ("EACCES",),
    "read the agent's environment": ("EACCES",),
    "read the agent's memory": ("EACCES",),
    "look for processes": ("EACCES",),
    "look into homes": ("EACCES", "ENOENT"),
    "change a mode": ("EPERM",),
    "change times": ("EPERM",),
    "make a device": ("EPERM",),
    "open a socket": ("EPERM",),
    "open a socket in an old thread": ("EPERM",),
    "open a local socket": ("EPERM",),
    "datagrams by a pair": ("EPERM",),
    "connect": ("EPERM",),
    "execute": ("EPERM",),
    "run a program": ("EPERM",),
    "fork": ("EPERM",),
    "trace the agent": ("EPERM",),
    "read the agent's memory directly": ("EPERM",),
    "signal the agent": ("EPERM",),
    "signal its group": ("EPERM",),
    "signal everybody": ("EPERM",),
    "limit the agent": ("EPERM",),
    "slow the agent down": ("EPERM",),
    "send signals by a file": ("EPERM",),
    "outlive the agent": ("EPERM",),
    "a namespace": ("EPERM",),
    "a mount": ("EPERM",),
    "bpf": ("EPERM",),
    "io_uring": ("EPERM",),
    "userfaultfd": ("EPERM",),
    "keys": ("EPERM",),
    "a call of tomorrow": ("ENOSYS",),
    "take all memory": ("MemoryError",),
    "raise a limit": ("ValueError", "EPERM"),
}


@pytest.fixture(scope="module", params=["our user", "nobody"])
def confined(request):
    if request.param == "nobody" and os.getuid() != 0:
        pytest.skip("only root becomes another user")
    return run(NOBODY if request.param == "nobody" else 0)


def run(uid=0, *refused):
    """What one process had granted, and what became of all it tried."""
    # Not below pytest's folder, which is its user's alone.
    base = Path(tempfile.mkdtemp(prefix="roost-test-"))
    base.chmod(0o777)
    folders = [base / name for name in ("scratch", "readable", "private")]
    for folder in folders:
        folder.mkdir()
        folder.chmod(0o777)
    scratch, readable, private = folders
    for file in (readable / "model", private / "secret"):
        file.write_text("amqp://user:secret@host/")
        file.chmod(0o666)
    try:
        process = subprocess.run(
            [
                *(sys.executable, "-m", "tests.unit.engine.confine_attempts"),
                *(str(scratch), str(readable), str(private / "secret"), str(uid), *refused),
            ],
            capture_output=True, text=True, cwd=ROOT, check=False, timeout=120,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        told = json.loads(process.stdout)
        assert not list(base.rglob("planted"))
        assert "secret" in (readable / "model").read_text()
        return told
    finally:
        shutil.rmtree(base, ignore_errors=True)


def because(told) -> str:
    lacks = [f"{name} ({detail})" for name, held, detail in told["measures"] if not held]
    return f"this host does not grant {', '.join(lacks)}"


@pytest.mark.parametrize("attempt", ALLOWED)
def test_what_an_engine_needs_it_can_do(confined, attempt):
    """Confinement that kills healthy engines is worse than none."""
    result = confined["results"][attempt]
    if result == "skipped":
        pytest.skip(because(confined))
    assert result == "done"


@pytest.mark.parametrize("attempt", FORBIDDEN)
def test_what_a_model_has_no_business_with_is_an_error(confined, attempt):
    """As an error, not as the engine's end: the program gets it, its client an answer."""
    result = confined["results"][attempt]
    if result == "skipped":
        pytest.skip(because(confined))
    assert result in FORBIDDEN[attempt]


def test_each_measure_is_told_of(confined):
    """Those that hold, and those that the host did not grant, with its reason."""
    names = [name for name, _, _ in confined["measures"]]
    assert names == [
        "oom_score", *(each for each in ("namespaces", "mounts") if each in names),
        "limits", "capabilities", "no_new_privileges", "landlock", "memory",
        "seccomp",
    ]  # fmt: skip
    assert "namespaces" in names
    assert all(held or detail for _, held, detail in confined["measures"])


def held(told) -> set[str]:
    return {name for name, is_held, _ in told["measures"] if is_held}


def test_without_landlock_files_are_still_read_only():
    """Where it is not switched on, the engine's own view of the mounts has to do."""
    told = run(0, "landlock_abi")
    assert "landlock" not in held(told)
    if "mounts" not in held(told):
        pytest.skip(because(told))
    writes = [name for name in FORBIDDEN if name.startswith(("write", "delete"))]
    assert {told["results"][name] for name in writes} == {"EROFS"}
    assert told["results"]["open a socket"] == "EPERM"
    assert told["results"]["write to scratch"] == "done"


def test_in_a_container_that_grants_no_namespace_the_rest_holds():
    """As in Docker's default profile: no file is written, no secret read, nobody is called."""
    told = run(0, "unshare")
    assert not {"namespaces", "mounts"} & held(told)
    if "landlock" not in held(told):
        pytest.skip(because(told))
    wrong = {
        name: result
        for name, result in told["results"].items()
        if result not in FORBIDDEN.get(name, ("done",))
    }
    assert not wrong


def test_where_nothing_is_granted_a_process_still_works_and_says_so():
    """An old or foreign kernel: every refusal has its reason."""
    told = run(0, "unshare", "landlock_abi", "filter_calls")
    assert not {"namespaces", "mounts", "landlock", "seccomp"} & held(told)
    assert {told["results"][name] for name in ALLOWED} <= {"done", "skipped"}
    details = {name: detail for name, _, detail in told["measures"]}
    assert details["seccomp"] == details["landlock"] == "Function not implemented"


def test_nothing_is_tried_that_is_not_judged(confined):
    """The two lists and the script agree."""
    assert set(confined["results"]) == {*ALLOWED, *FORBIDDEN}
