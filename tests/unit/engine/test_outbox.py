from __future__ import annotations

import pytest

from services.worker.arena import Arena
from services.worker.engine.failures import Failed
from services.worker.engine.outbox import Outbox


@pytest.fixture
def outbox():
    arena = Arena.create("outbox", 256)
    yield Outbox(arena)
    arena.close()


def test_a_block_is_given_back_by_its_batch(outbox):
    """Releasing a batch makes its room free; an unknown batch is passed over."""
    assert outbox.reserve(1, 128) == 0
    assert outbox.reserve(2, 128) == 128
    outbox.release((7, 1))
    assert outbox.reserve(3, 64) == 0


def test_what_could_never_fit_is_refused_at_once(outbox):
    """Waiting would be for ever."""
    outbox.reserve(1, 256)
    with pytest.raises(Failed, match="257 bytes, the worker's outbox holds 256") as caught:
        outbox.reserve(2, 257)
    assert caught.value.code == "too_large"


def test_a_full_outbox_says_so(outbox):
    """There is room again when enough has been released."""
    outbox.reserve(1, 128)
    outbox.reserve(2, 128)
    assert outbox.reserve(3, 256) is None
    outbox.release((1,))
    assert outbox.reserve(3, 256) is None
    outbox.release((2,))
    assert outbox.reserve(3, 256) == 0
