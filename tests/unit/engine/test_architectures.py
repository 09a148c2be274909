from __future__ import annotations

import pytest

pytest.importorskip("torch")

from services.worker.engine.architectures import Architectures

pytestmark = pytest.mark.torch


def known(architectures, *keys):
    for key in keys:
        architectures.of(key).skeleton = f"skeleton {key}"


def test_a_key_is_always_the_same_architecture():
    """What was found out about it is there the next time."""
    architectures = Architectures()
    architectures.of("a").unshareable = "it writes"
    architectures.forget_unused()
    assert architectures.of("a").unshareable == "it writes"


def test_the_unused_that_were_asked_for_longest_ago_are_forgotten():
    """A few stay warm; what a model or a load needs is not among them."""
    architectures = Architectures(kept_unused=2)
    known(architectures, "a", "b", "c", "d", "e", "f")
    architectures.of("b").models.add("m/1")
    architectures.of("c").waiting.append("a load")
    architectures.of("e").preparing = "a load"
    architectures.of("a")  # d, f, a are unused, in this order
    assert architectures.forget_unused() == ["skeleton d"]
    assert architectures.forget_unused() == []
    assert architectures.of("d").skeleton is None
    assert architectures.of("a").skeleton == "skeleton a"


def test_what_was_only_asked_about_leaves_nothing():
    """Keys of strangers' files do not pile up."""
    architectures = Architectures()
    first = architectures.of("a")
    architectures.forget_unused()
    assert architectures.of("a") is not first
