"""No pickle on any wire: nothing that is shipped reads bytes in a way that runs them. Model files
are programs all the same, and are run by torch in the engine alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torchscript_files import Name, Raw, Thing, archive, entries, module, write

ROOT = Path(__file__).parents[2]
SHIPPED = ("shared", "services", "roost", "sim", "examples", "benchmarks")
MODULES = {
    "cPickle", "cloudpickle", "copyreg", "dbm", "dill", "joblib", "jsonpickle", "marshal",
    "multiprocessing", "pandas", "pickle", "shelve", "xmlrpc", "yaml",
}  # fmt: skip
"""What unpickles, or what may (a `multiprocessing` connection does)."""
CALLS = {"eval", "exec", "__import__"}
LOADERS = {"torch.load": "weights_only", "np.load": "allow_pickle", "numpy.load": "allow_pickle"}
SAFE = {"weights_only": True, "allow_pickle": False}


def findings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (name for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                yield called
            if any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords):
                yield f"{called} with a shell"
            if called in LOADERS:
                flag = LOADERS[called]
                told = [ast.unparse(k.value) for k in node.keywords if k.arg == flag]
                if told != [str(SAFE[flag])]:
                    yield f"{called} without {flag}={SAFE[flag]}"


def test_nothing_that_is_shipped_unpickles():
    """No import of what does, no loader that may, no text that is run."""
    found = {}
    for folder in SHIPPED:
        for path in (ROOT / folder).rglob("*.py"):
            told = sorted(findings(ast.parse(path.read_text())))
            if told:
                found[str(path.relative_to(ROOT))] = told
    assert found == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from marshal import loads", "import os, shelve", "eval(x)",
     "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
     "subprocess.run(x, shell=True)", "def f():\n  from yaml import load"],
)  # fmt: skip
def test_the_look_finds_what_it_looks_for(source):
    """Wherever it stands."""
    assert list(findings(ast.parse(source)))


def _call(function: str, argument: str) -> bytes:
    return b"\x80\x02" + Name(function).write() + write((argument,)) + b"R."


def _file(data: bytes) -> bytes:
    members = entries(Thing("__torch__.M", n=1), {}, {"__torch__": module()})
    return archive({**members, "data.pkl": data, "constants.pkl": data})


WATCHED = """
import io, sys
from pathlib import Path
import shared.archive, shared.pt2, shared.layout.torchscript as reader
data = Path(sys.argv[1]).read_bytes()
seen = []
RUN = ("exec", "compile", "import", "os.", "subprocess.", "pickle.", "marshal.", "socket.")
reader.read_layout(io.BytesIO(data))  # codecs are imported as they are needed
sys.addaudithook(lambda event, _: event.startswith(RUN) and seen.append(event))
shared.pt2.check_model(io.BytesIO(data))
layout = reader.read_layout(io.BytesIO(data))
print(layout.obstacle, seen)
"""


@pytest.mark.parametrize(
    "data",
    [
        _call("os.system", "touch ran"),
        _call("builtins.eval", "open('ran', 'w')"),
        _call("__builtin__.exec", "open('ran', 'w')"),
        b"\x80\x02" + write(Raw(b"cos\nsystem\n")) + write("touch ran") + b"\x85R.",
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
        b"\x80\x02(S'touch ran'\nios\nsystem\n.",
        b"\x80\x02}(X\x01\x00\x00\x00acos\nsystem\nub.",
    ],
)
def test_reading_a_pickle_runs_nothing(tmp_path, data):
    """The registry takes a model's file apart with an interpreter of its own, which knows torch's
    operations and does none: no import, no call, no file, seen by Python's own audit."""
    file = tmp_path / "m.pt"
    file.write_bytes(_file(data))
    ran = subprocess.run(
        [sys.executable, "-c", WATCHED, str(file)],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    obstacle, _, seen = ran.stdout.strip().rpartition(" ")
    assert (seen, obstacle != "None") == ("[]", True), ran.stdout
    assert not (tmp_path / "ran").exists()
