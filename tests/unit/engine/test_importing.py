from __future__ import annotations

import io
import pickletools
import threading
import time
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.importing import (  # noqa: E402
    PLAIN_LOADS,
    Refused,
    import_program,
    read_storages,
    rename_storages,
    take_apart,
)
from shared.layout.torchscript import read_layout  # noqa: E402
from tests.unit.engine import engine_models as models  # noqa: E402
from tests.unit.engine import program_harness as harness  # noqa: E402
from tests.unit.engine.loader_harness import BUDGET_BYTES, Rig  # noqa: E402

pytestmark = pytest.mark.torch


class Layer(nn.Module):
    """As in BERT, but for the size of its weights."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.drop = nn.Dropout(0.1)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), 2, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.heads(self.query(x)), self.heads(self.key(x))
        scores = self.drop(torch.softmax(query @ key.transpose(-1, -2), -1))
        mixed = (scores @ self.heads(self.value(x))).transpose(1, 2).reshape(x.shape)
        x = self.norms[0](x + self.drop(self.out(mixed)))
        return self.norms[1](x + self.down(nn.functional.gelu(self.up(x))))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A file with a graph as large as BERT-base's."""
    model = nn.Sequential(*(Layer() for _ in range(12))).eval()
    path = tmp_path_factory.mktemp("deep") / "deep.pt"
    return harness.traced(model, [torch.randn(1, 4, 16)], path)


def longest_stall(work) -> float:
    """Seconds for which a thread that wants to run all the time could not, while `work` ran."""
    longest = 0.0
    stop = threading.Event()
    ticking = threading.Event()

    def tick():
        nonlocal longest
        last = time.perf_counter()
        while not stop.wait(0.0002):
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
            ticking.set()

    ticker = threading.Thread(target=tick)
    ticker.start()
    ticking.wait()
    longest = 0.0
    try:
        work()
    finally:
        stop.set()
        ticker.join()
    return longest


def test_a_thread_beside_an_import_goes_on(deep):
    """The longest time that another thread waits is at most half of what it waits for a plain
    load of the same file; it is a twentieth, on a machine that does nothing else."""
    ours = min(longest_stall(lambda: harness.skeleton_of(deep)) for _ in range(4))
    whole = min(longest_stall(lambda: harness.whole_of(deep)) for _ in range(4))
    plain = min(longest_stall(lambda: torch.jit.load(str(deep))) for _ in range(4))
    assert ours <= plain / 2, f"{ours * 1e3:.1f} ms, plain {plain * 1e3:.1f} ms"
    assert whole <= plain / 2, f"{whole * 1e3:.1f} ms, plain {plain * 1e3:.1f} ms"


def test_nothing_is_loaded_by_torch_itself(deep, monkeypatch):
    """`torch.jit.load` would stall every batch: neither a new architecture, nor a known one, nor
    a file that is loaded whole comes that way, from the command to the answer."""

    def fail(*args, **kwargs):
        raise AssertionError("torch.jit.load was called")

    monkeypatch.setattr(torch.jit, "load", fail)
    before = PLAIN_LOADS.copy()
    rig = Rig(host_bytes=BUDGET_BYTES)
    layout = read_layout(deep)
    loads = [
        rig.load("new/1", deep, layout=layout),
        rig.load("held/1", deep, layout=layout, tier="host"),
        rig.load("held/1", deep, layout=layout, keep_host=True),
        rig.load("whole/1", deep),
        rig.load("whole/2", deep, layout=layout, stateful=True),
    ]
    assert [each.architecture for each in loads] == ["new", "none", "known", "none", "none"]
    values = [torch.randn(1, 4, 16)]
    answers = [
        harness.run(rig.dispatcher.residents[model].executor, values)
        for model in ("new/1", "held/1", "whole/1", "whole/2")
    ]
    assert all(harness.same_bits(each, answers[0]) for each in answers)
    rig.end()
    assert before == PLAIN_LOADS


def test_what_the_import_refuses_is_loaded_by_torch(tmp_path, capsys):
    """A file that only torch can read is served all the same, and counted; the log says which
    and why, since every batch waits for it."""
    path = harness.scripted(models.Linear(), tmp_path / "plain.pt")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(Refused, match="compressed"):
        take_apart(harness.open_file(packed))
    before = PLAIN_LOADS.total()
    values = [torch.randn(2, 4)]
    assert harness.same_bits(
        harness.run(harness.whole_of(packed), values), harness.run(harness.whole_of(path), values)
    )
    assert PLAIN_LOADS.total() == before + 1
    assert capsys.readouterr().err == (
        "m/1 is loaded by torch.jit.load, which stalls all batches: 'its tensors are compressed'\n"
    )


def test_what_is_no_torchscript_is_refused_at_once(tmp_path):
    """A checkpoint, or anything else: the error says what it is instead."""
    path = tmp_path / "checkpoint.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(Failed, match="not TorchScript") as caught:
        take_apart(harness.open_file(path))
    assert caught.value.code == "model_failed"


def test_a_program_that_torch_does_not_understand_is_refused(tmp_path):
    """With torch's own words."""
    path = harness.scripted(models.Linear(), tmp_path / "m.pt")
    file = harness.open_file(path)
    parts = take_apart(file)
    for name in parts.texts:
        if name.startswith("code/"):
            parts.texts[name] = parts.texts[name].replace(b"torch.linear", b"torch.lineal")
    with pytest.raises(Refused, match="lineal"):
        import_program(parts, read_storages(file, parts.weights), {})


def pickled(tensors: dict[str, Tensor]) -> bytes:
    """How torch writes constants: in a traced function, which closes over them."""

    def forward(x: Tensor) -> Tensor:
        for tensor in tensors.values():
            x = x + tensor
        return x

    out = io.BytesIO()
    torch.jit.save(torch.jit.trace(forward, torch.zeros(3), check_trace=False), out)
    with zipfile.ZipFile(out) as archive:
        name = next(name for name in archive.namelist() if name.endswith("constants.pkl"))
        return archive.read(name)


def keys_in(pickle: bytes) -> list[str]:
    strings = [
        text for opcode, text, _ in pickletools.genops(pickle) if opcode.name[:6] == "BINUNI"
    ]
    return [text for text in strings if text[-1].isdigit()]


def test_constants_get_names_of_their_own():
    """Their storages are numbered from 0, as those of the weights are."""
    base = torch.randn(6)
    pickle = pickled({"a": torch.ones(3), "b": base[:3], "c": base[3:], "d": torch.zeros(3)})
    assert keys_in(pickle) == ["0", "1", "2"]
    renamed = rename_storages(pickle, "c")
    assert keys_in(renamed) == ["c0", "c1", "c2"]
    assert rename_storages(b"\x80\x02).", "c") == b"\x80\x02)."


@pytest.mark.parametrize(
    "pickle",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02(X\x01\x00\x00\x000tQ.",
        b"\x80\x02(X\x01\x00\x00\x00sX\x01\x00\x00\x00tK\x00X\x01\x00\x00\x00uK\x01tQ.",
        b"\x80\x02(X\x01\x00\x00\x00sX\x01\x00\x00\x00tX\x01\x00\x00\x000q\x01h\x01K\x01tQ.",
    ],
)
def test_constants_that_torch_would_not_write_are_refused(pickle):
    """Cut off, with too few parts, with a number for a key, with a key that is used twice."""
    with pytest.raises(Refused):
        rename_storages(pickle, "c")


def test_importing_again_and_again_takes_no_memory(tmp_path):
    """A program that is let go of is gone."""
    path = harness.scripted(models.Linear(), tmp_path / "m.pt")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(30):
        harness.skeleton_of(path).close()
    before = resident()
    for _ in range(150):
        harness.skeleton_of(path).close()
    assert resident() - before < 4 << 20
