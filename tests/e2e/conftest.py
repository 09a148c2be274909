"""One real stack for all end-to-end tests: `roost up`, as a person starts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import Up, save_doubler
from tests.e2e.steady import answers, holds_nothing, signs, until


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A running stack with one worker of 512 MiB and the model `doubler`."""
    folder = tmp_path_factory.mktemp("stack")
    stack = Up(folder / "data", "--workers", "1", "--budget", "512MiB", "--device", "cpu")
    try:
        stack.wait_ready()
        stack.roost("push", "doubler", str(save_doubler(folder)), "--manifest", str(_spec(folder)))
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def http(up: Up) -> Iterator[httpx.Client]:
    """A client of the stack's gateway."""
    with httpx.Client(base_url=up.url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def steady(up: Up, http: httpx.Client) -> Iterator[None]:
    """After the test the stack is as before: it answers, holds nothing, and no process, engine
    or connection of it was replaced."""
    answers(http)
    before = signs(up)
    yield
    answers(http)
    until(lambda: holds_nothing(up), "nothing is held any more")
    assert signs(up) == before


def _spec(folder: Path) -> Path:
    path = folder / "doubler.json"
    path.write_text(
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}],'
        ' "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],'
        ' "max_batch_size": 16}'
    )
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.torch)
            item.add_marker(pytest.mark.services)
