"""docs/amqp.md shows what works: each of its examples is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.e2e.running import ROOT

BLOCKS = re.findall(
    r"^```(python|bash)\n(.*?)^```", (ROOT / "docs/amqp.md").read_text(), re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(
    ("language", "code"), BLOCKS, ids=["pika", "aio-pika", "shell"][: len(BLOCKS)]
)
def test_each_example_gets_its_answer(up, language, code):
    """The example as printed, given only the addresses, prints the doubled numbers."""
    interpreter = {"python": [sys.executable, "-c"], "bash": ["bash", "-euc"]}[language]
    done = subprocess.run(
        [*interpreter, code],
        env=os.environ
        | {
            "AMQP_URL": up.endpoints["amqp"],
            "MANAGEMENT_URL": up.endpoints["rabbitmq management"],
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Each prints in its own way: [2.0,4.0,6.0] in JSON, [[2. 4. 6.]] by numpy.
    assert re.search(r"2[.0]*,?\s*4[.0]*,?\s*6", done.stdout), done.stdout
    assert "ok" in done.stdout


def test_there_are_three_examples():
    """pika, aio-pika and a shell client."""
    assert [language for language, _ in BLOCKS] == ["python", "python", "bash"]
