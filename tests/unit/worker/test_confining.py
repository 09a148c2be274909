"""What the agent asks of an engine's confinement, and the folder that an engine has."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest
import structlog

from services.worker import confining
from services.worker.config import WorkerConfig
from services.worker.confinement.plan import Confinement, Measure
from services.worker.launch import start
from shared.config import ConfigError


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files go."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def config(tmp_path, **settings) -> WorkerConfig:
    return WorkerConfig(
        repository_url=str(tmp_path / "repository"), data_dir=str(tmp_path / "data"), **settings
    )


def test_an_engine_reads_models_files_and_nothing_else_of_the_repository(tmp_path):
    """There, and in the cache: not the manifests, keys and jobs beside them. The folders are
    made, so that they are there when the engine is told of them."""
    asked = confining.confinement(config(tmp_path))
    assert asked.mode == "auto"
    assert asked.readable == (
        str(tmp_path / "repository" / "blobs"),
        str(tmp_path / "data" / "cache" / "blobs"),
    )
    assert all(Path(folder).is_dir() for folder in asked.readable)


def test_folders_besides_are_the_operators_word(tmp_path):
    """And must be there: a typing error would show as a library that cannot be loaded."""
    (tmp_path / "software").mkdir()
    more = confining.confinement(config(tmp_path, engine_reads=f"{tmp_path}/software"))
    assert more.readable[0] == f"{tmp_path}/software"
    with pytest.raises(ConfigError, match=r"ENGINE_READS: /nowhere is not there"):
        confining.confinement(config(tmp_path, engine_reads=f"{tmp_path}/software:/nowhere"))


def test_without_confinement_nothing_is_asked(tmp_path):
    """For debugging; and the log says that it is so."""
    assert confining.confinement(config(tmp_path, confine="off")) == Confinement()
    with structlog.testing.capture_logs() as logs:
        confining.tell((), 7)
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        ("engine_not_confined", "warning")
    ]


@pytest.mark.parametrize(("held", "level"), [(True, "info"), (False, "warning")])
def test_the_log_says_what_holds_and_what_does_not(held, level):
    """As a warning where something essential is lacking."""
    measures = tuple(
        Measure(name, held=held or name != "seccomp", detail="d")
        for name in ("capabilities", "no_new_privileges", "landlock", "seccomp")
    )
    with structlog.testing.capture_logs() as logs:
        confining.tell(measures, 7)
    (entry,) = logs
    assert entry["log_level"] == level
    assert entry["lacks"] == ("" if held else "seccomp (d)")
    assert "landlock (d)" in entry["holds"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root may start an engine as another user")
@pytest.mark.parametrize(
    ("user", "ids"),
    [("nobody", (65534, None)), ("65534", (65534, None)), ("4711:4712", (4711, 4712))],
)
def test_an_engine_may_have_a_user_of_its_own(tmp_path, user, ids):
    """By name or by number; a number without an entry brings its group along."""
    asked = confining.confinement(config(tmp_path, engine_user=user))
    assert asked.uid == ids[0]
    assert ids[1] in (None, asked.gid)
    assert asked.gid > 0


@pytest.mark.parametrize("user", ["no-such-user", "4711", "0:0", "root", "nobody:no-such-group"])
def test_a_user_that_cannot_be_is_refused(tmp_path, user):
    """When the worker starts, not when its engine does."""
    with pytest.raises(ConfigError, match="ROOST_WORKER_ENGINE_USER"):
        confining.confinement(config(tmp_path, engine_user=user))


def test_what_is_required_is_tried_before_the_worker_starts(tmp_path, monkeypatch):
    """In a process of its own; where the host does not grant it, one error says all that lacks."""
    lacking = [Measure("seccomp", held=False, detail="Function not implemented")]
    monkeypatch.setattr(confining, "_probed", lambda _: lacking)
    with pytest.raises(ConfigError, match=r"does not grant: capabilities.*; seccomp: Function not"):
        confining.confinement(config(tmp_path, confine="require"))


def test_this_host_is_asked_what_it_grants(tmp_path):
    """The real thing: each measure has a name, and a reason where it does not hold."""
    measures = confining._probed(Confinement("require"))
    assert {each.name for each in measures} >= {"capabilities", "landlock", "seccomp", "limits"}
    assert all(each.held or each.detail for each in measures)


def test_files_of_a_fresh_driver_are_made_before_an_engine_is_confined(tmp_path, monkeypatch):
    """By the driver's own program, once, and only where there is a driver."""
    dev, program = tmp_path / "dev", tmp_path / "bin" / "nvidia-modprobe"
    dev.mkdir()
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{dev}/nvidia-uvm\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    confining.make_device_files(dev)
    assert not list(dev.iterdir())
    (dev / "nvidiactl").touch()
    confining.make_device_files(dev)
    confining.make_device_files(dev)
    assert (dev / "nvidia-uvm").read_text() == "-u -c 0\n"


# --- the folder


def test_an_engine_s_folder_is_its_own_and_goes_with_it(temporary):
    """With all that was left in it."""
    scratch = confining.Scratch(Confinement("auto"))
    folder = Path(scratch.path)
    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    assert set(scratch.environment().values()) == {scratch.path}
    (folder / "left").mkdir()
    (folder / "left" / "behind").write_text("")
    scratch.remove()
    scratch.remove()
    assert not list(temporary.iterdir())


def test_folders_of_killed_agents_are_swept_and_those_in_use_are_not(temporary):
    """A lock tells: it ends with the process that holds it."""
    left = temporary / "roost-engine-left"
    used = temporary / "roost-engine-used"
    for folder in (left, used):
        folder.mkdir()
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        first, second = (confining.Scratch(Confinement("auto")) for _ in range(2))
        assert {each.name for each in temporary.iterdir()} == {
            used.name, Path(first.path).name, Path(second.path).name,
        }  # fmt: skip
        first.remove()
        second.remove()
    finally:
        os.close(descriptor)


async def test_the_folder_goes_when_the_engine_has_ended_or_could_not_begin(temporary):
    """However it ends."""
    scratch = confining.Scratch(Confinement("auto"))
    engine = await start("true", on_end=scratch.remove)
    assert await engine.wait() == 0
    assert not list(temporary.iterdir())
    scratch = confining.Scratch(Confinement("auto"))
    with pytest.raises(FileNotFoundError):
        await start("/nowhere/at/all", on_end=scratch.remove)
    assert not list(temporary.iterdir())
