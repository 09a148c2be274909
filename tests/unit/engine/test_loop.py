from __future__ import annotations

import pytest

pytest.importorskip("torch")

from services.worker.engine.loop import _guarded

pytestmark = pytest.mark.torch


def test_each_thread_stands_on_the_device_before_it_works():
    """Torch keeps that per thread, and means the first device where nobody has said anything."""
    story = []

    class Device:
        def enter_thread(self):
            story.append("entered")

    _guarded(lambda: story.append("worked"), None, Device())()
    assert story == ["entered", "worked"]
