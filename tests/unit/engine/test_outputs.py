"""What a model may return, before the agent hears of it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.outputs import MAX_NAME, MAX_OUTPUTS, named  # noqa: E402

pytestmark = pytest.mark.torch
ONE = torch.ones(1)


def test_a_model_has_so_many_outputs():
    """More would be a reply that no gateway reads; the model fails, not the engine."""
    assert len(named(tuple([ONE] * MAX_OUTPUTS), None)) == MAX_OUTPUTS
    with pytest.raises(Failed, match="257 outputs"):
        named(tuple([ONE] * (MAX_OUTPUTS + 1)), None)


def test_their_names_are_of_a_length():
    """A model chooses the keys of its dict as it likes, also by what it was asked."""
    assert named({"y" * MAX_NAME: ONE}, None)
    with pytest.raises(Failed, match="more than 256 characters"):
        named({"y" * (MAX_NAME + 1): ONE}, None)
