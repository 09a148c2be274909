"""Models that are no models: pushed, asked for, and loaded by a real worker's engine.

A TorchScript file is a program, and a `.pt2` may be native code. Through gateway, placer, worker
and engine, as anybody's file would come; the worker takes what this host grants.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch

from roost.client import AsyncRoostClient
from roost.stack.embedded import EmbeddedStack
from roost.stack.port import StackConfig
from services.worker.confinement.plan import Measure
from services.worker.engine.loop import EXIT_DEVICE_LOST
from services.worker.launch import engine_environment
from services.worker.wire import EngineFailed, EngineStarted
from shared.errors import RoostError
from shared.models import ModelSpec, TensorSpec
from shared.repository import Repository
from tests.pt2_archives import FOLDER, compiled
from tests.unit.engine.engine_harness import EngineProcess

pytestmark = pytest.mark.torch
SECRET = "amqp://user:s3cret@host/"
SPEC = ModelSpec(inputs=(TensorSpec("x", "FP32", (4,)),), max_batch_size=4)


class Good(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Stateful(torch.nn.Module):
    """Keeps a state from call to call, as a voice detector does."""

    def __init__(self) -> None:
        super().__init__()
        self.h = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.h = self.h + 1
        return x + self.h


class Writes(torch.nn.Module):
    """Saves a tensor when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(4), self.path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Maps(torch.nn.Module):
    """Has a file as a tensor when it is loaded: reads it, or writes to it."""

    def __init__(self, path: str, shared: bool) -> None:
        super().__init__()
        self.path = path
        self.shared = shared

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool, bool]:
        return self.path, self.shared, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool, bool]) -> None:
        self.path = state[0]
        self.shared = state[1]
        self.training = state[2]
        print(torch.from_file(self.path, self.shared, 4, dtype=torch.uint8))  # noqa: T201

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
async def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EmbeddedStack]:
    """One worker with a CPU as its device, which knows something worth stealing."""
    monkeypatch.setenv("TEST_SECRET", SECRET)
    running = EmbeddedStack(StackConfig(data_dir=tmp_path, budget_bytes=256 << 20, device="cpu"))
    try:
        await running.start()
        yield running
    finally:
        await running.close()


def register(root: Path, name: str, data: bytes | torch.nn.Module, **changes: object) -> None:
    if isinstance(data, torch.nn.Module):
        path = root / f"{name}.pt"
        torch.jit.script(data).save(str(path))
        data = path.read_bytes()
        path.unlink()
    repository = Repository(str(root / "repository"))
    spec = ModelSpec(inputs=SPEC.inputs, **{"max_batch_size": 4, **changes})  # type: ignore[arg-type]
    repository.register(name, 1, spec, repository.files.put([data])[0])


async def ask(
    running: EmbeddedStack, name: str, shape: tuple[int, ...] = (1, 4)
) -> np.ndarray | str:
    """What it answers to ones, or why it does not."""
    async with AsyncRoostClient(running.gateway_url) as client:
        try:
            outputs = await client.infer(name, {"x": np.ones(shape, np.float32)}, timeout_s=60)
        except RoostError as error:
            return str(error)
    (answer,) = outputs.values()
    return np.asarray(answer)


def check_that_it_writes_elsewhere(planted: Path, folder: Path) -> None:
    """Where nothing holds it, such a model does write: else the test below would tell nothing."""
    torch.jit.script(Writes(str(planted))).save(str(folder / "writes.pt"))
    planted.unlink(missing_ok=True)  # scripting copies the module, and may have run it
    torch.jit.load(str(folder / "writes.pt"))
    assert planted.exists()


def granted(logs: list[dict[str, object]]) -> str:
    """What holds in the engine, by its own word."""
    (line,) = (entry for entry in logs if entry["event"] == "engine_confined")
    return str(line["holds"])


async def test_a_model_cannot_write_or_read_files_while_it_is_loaded(tmp_path, monkeypatch):
    """Nor anything of the worker's. It gets an error where torch looks for one; the engine goes
    on with the others."""
    check_that_it_writes_elsewhere(tmp_path / "control", tmp_path)
    monkeypatch.setenv("TEST_SECRET", SECRET)
    planted, secret = tmp_path / "planted", tmp_path / "secret"
    secret.write_text(SECRET)
    root = tmp_path / "repository"
    with structlog.testing.capture_logs() as logs:
        running = EmbeddedStack(
            StackConfig(data_dir=tmp_path, budget_bytes=256 << 20, device="cpu")
        )
        register(tmp_path, "writes", Writes(str(planted)))
        register(tmp_path, "pollutes", Writes(str(root / "blobs" / "planted")))
        register(tmp_path, "makes", Maps(str(planted), shared=True))
        register(tmp_path, "changes", Maps(str(secret), shared=True))
        register(tmp_path, "reads", Maps(str(secret), shared=False))
        register(tmp_path, "good", Good())
        try:
            await running.start()
            answers = {
                name: await ask(running, name)
                for name in ("writes", "pollutes", "makes", "changes", "reads", "good")
            }
        finally:
            await running.close()
    if "landlock" not in granted(logs):
        pytest.skip(f"this host grants only {granted(logs)}")
    np.testing.assert_array_equal(answers.pop("good"), np.full((1, 4), 2, np.float32))
    for name in ("makes", "changes", "reads"):  # torch does not look whether it could save
        answer = answers[name]
        assert re.search(r"[Pp]ermission denied|Read-only|cannot be opened", str(answer)), name
    assert not list(tmp_path.rglob("planted"))
    assert secret.read_text() == SECRET
    assert not [entry for entry in logs if entry["event"] == "engine_lost"]
    assert SECRET not in str(logs)


NATIVE = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

extern char **environ;

static void tell(const char *what, long result) {
    fprintf(stderr, "TRIED %s: %s\n", what, result < 0 ? strerror(errno) : "done");
}

__attribute__((constructor)) static void run(void) {
    int found = 0;
    char path[64];
    tell("socket", socket(AF_INET, SOCK_STREAM, 0));
    tell("local socket", socket(AF_UNIX, SOCK_DGRAM, 0));
    tell("write", open("PLANTED", O_WRONLY | O_CREAT, 0600));
    snprintf(path, sizeof path, "/proc/%d/environ", getppid());
    tell("agent's environment", open(path, O_RDONLY));
    tell("agent's memory", ptrace(PTRACE_ATTACH, getppid(), 0, 0));
    tell("agent's signals", kill(getppid(), 0));
    tell("survival", prctl(PR_SET_PDEATHSIG, 0));
    char *arguments[] = {"sh", "-c", "exit 3", 0};
    long child = vfork();
    if (!child) _exit(0);
    tell("process", child);
    tell("program", execv("/bin/sh", arguments));
    for (char **each = environ; *each; each++) found |= strstr(*each, "s3cret") != 0;
    errno = ENOENT;
    tell("secret", found ? 0 : -1);
}
"""
TRIED = {
    "socket", "local socket", "write", "agent's environment", "agent's memory", "agent's signals",
    "survival", "process", "program", "secret",
}  # fmt: skip


NO_FILTER = """
import errno, os, runpy
from services.worker.confinement import kernel

def refuse(program):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

kernel.filter_calls = refuse
runpy.run_module("services.worker.engine", run_name="__main__", alter_sys=True)
"""
"""An engine on a kernel without seccomp."""


def native(folder: Path, planted: Path) -> bytes:
    """A compiled package whose library does all this as it is loaded."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no compiler")
    source, library = folder / "evil.c", folder / "evil.so"
    source.write_text(NATIVE.replace("PLANTED", str(planted)))
    subprocess.run(
        [compiler, "-w", "-shared", "-fPIC", "-o", str(library), str(source)], check=True
    )
    target = f'{{"AOTI_DEVICE_KEY": "cpu", "AOTI_MACHINE": "{os.uname().machine}"}}'.encode()
    return compiled(**{
        f"{FOLDER}abc.wrapper.so": library.read_bytes(),
        f"{FOLDER}abc.wrapper_metadata.json": target,
    })  # fmt: skip


async def test_native_code_reaches_nothing_and_nobody(tmp_path, monkeypatch):
    """It runs as it is loaded, with all that a process can do; the system says no to each."""
    monkeypatch.setenv("TEST_SECRET", SECRET)
    planted = tmp_path / "planted"
    with structlog.testing.capture_logs() as logs:
        running = EmbeddedStack(
            StackConfig(data_dir=tmp_path, budget_bytes=256 << 20, device="cpu")
        )
        register(tmp_path, "native", native(tmp_path, planted))
        register(tmp_path, "good", Good())
        try:
            await running.start()
            answer = await ask(running, "native")
            good = await ask(running, "good")
        finally:
            await running.close()
    holds = granted(logs)
    if "seccomp" not in holds or "landlock" not in holds:
        pytest.skip(f"this host grants only {holds}")
    said = [str(entry["line"]) for entry in logs if entry["event"] == "engine_said"]
    tried = dict(line[6:].split(": ") for line in said if line.startswith("TRIED "))
    assert tried.keys() == TRIED, answer
    assert tried.pop("secret") == "No such file or directory"
    assert set(tried.values()) <= {
        "Operation not permitted", "Permission denied", "Read-only file system",
    }  # fmt: skip
    assert not planted.exists()
    assert isinstance(answer, str)
    np.testing.assert_array_equal(good, np.full((1, 4), 2, np.float32))


async def test_models_of_all_kinds_are_served_by_a_confined_engine(stack, tmp_path):
    """TorchScript, one with a state, an exported program; and the worker tells what holds."""
    exported = tmp_path / "exported.pt2"
    rows = torch.export.Dim("rows", min=1, max=4)
    program = torch.export.export(Good(), (torch.ones(2, 4),), dynamic_shapes=({0: rows},))
    torch.export.save(program, exported)
    register(tmp_path, "script", Good())
    register(tmp_path, "state", Stateful(), stateful=True, max_batch_size=0)
    register(tmp_path, "exported", exported.read_bytes(), format="export")
    for name in ("script", "exported"):
        np.testing.assert_array_equal(await ask(stack, name), np.full((1, 4), 2, np.float32))
    states = [await ask(stack, "state", (4,)) for _ in range(2)]
    np.testing.assert_array_equal(states, [[2.0] * 4, [3.0] * 4])


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_an_engine_that_lacks_what_is_required_says_so_and_ends(mode):
    """On a host without the filter; where it is not required, the engine serves and says so."""
    with EngineProcess(confine=mode, entry=("-c", NO_FILTER)) as engine:
        event = engine.event()
        if mode == "require":
            assert isinstance(event, EngineFailed)
            assert "confinement is required" in event.message
            assert "seccomp: Function not implemented" in event.message
            assert engine.exit_code() == EXIT_DEVICE_LOST
        else:
            assert isinstance(event, EngineStarted)
            (lacking,) = (each for each in event.confinement if each.name == "seccomp")
            assert lacking == Measure("seccomp", held=False, detail="Function not implemented")


def test_an_engine_gets_no_secret_by_a_familiar_name(monkeypatch):
    """Names that begin like a library's settings may end like a key's."""
    monkeypatch.setenv("NVIDIA_API_KEY", SECRET)
    monkeypatch.setenv("TORCH_HUB_TOKEN", SECRET)
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "0")
    environment = engine_environment(1)
    assert SECRET not in environment.values()
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "0"
