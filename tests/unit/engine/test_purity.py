from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from services.worker.engine.purity import why_impure  # noqa: E402
from services.worker.engine.torchscript import evaluate  # noqa: E402
from tests.property import skeleton_models as models  # noqa: E402
from tests.unit.engine import program_harness as harness  # noqa: E402

pytestmark = pytest.mark.torch


class Forks(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        future = torch.jit.fork(self.inner, x)
        return torch.jit.wait(future)


class TrainsItself(nn.Module):
    """`training` is not what it was saved as."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.training = True
        return self.norm(x)


class OwnFlag(nn.Module):
    """Has statistics, and a flag with another name."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))
        self.learning = False

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.variance, training=self.learning)


class Swaps(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        pair = {"a": x, "b": self.weight.detach()}
        pair["b"].zero_()
        return x


def reason(module: nn.Module, tmp_path) -> str | None:
    path = harness.scripted(module, tmp_path / "m.pt")
    loaded = torch.jit.load(str(path))._c
    evaluate(loaded)
    return why_impure(loaded)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (Forks, "prim::fork"),
        (TrainsItself, "training"),
        (OwnFlag, "statistics"),
        (Swaps, "weight"),
        (models.WritesBuffer, "total"),
        (models.WritesParameter, "weight"),
        (models.SetsAttribute, "attribute"),
        (models.GrowsList, "seen"),
        (models.KeepsStatistics, "statistics"),
    ],
)
def test_what_may_write_is_told_with_its_reason(make, told, tmp_path):
    """And with the name of what is written to."""
    assert told in (reason(make(), tmp_path) or "")


@pytest.mark.parametrize(
    "make",
    [
        models.ConvNet,
        lambda: models.ConvNet(inplace=True),
        models.Inplace,
        models.Branches,
        models.Calls,
        models.NoStatistics,
    ],
)
def test_what_writes_only_to_its_own_results_is_pure(make, tmp_path):
    """Also where it has a branch for training, which is never taken here."""
    assert reason(make().train(), tmp_path) is None


def test_a_constant_that_is_written_to_counts(tmp_path):
    """All models of the architecture would have it in common."""
    module = models.WritesConstant()
    path = harness.traced(module, [torch.zeros(2, 4)], tmp_path / "m.pt")
    assert why_impure(torch.jit.load(str(path))._c) == "it may write to a constant"
