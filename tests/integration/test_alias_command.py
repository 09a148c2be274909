"""`roost alias`, against a gateway without a placer: the test itself says when an alias flips."""

from __future__ import annotations

import argparse
import asyncio
import json
import re

import pytest
from msgspec.structs import replace

from roost.__main__ import main
from roost.client import AsyncRoostClient
from roost.commands.aliases import parse_split, show_split
from shared.errors import ModelNotFound
from tests.gateway_rig import SPEC, running, until


@pytest.fixture
async def rig(tmp_path):
    async with running(tmp_path) as made:
        made.register("adder", replace(SPEC, target_ms=20.0))
        yield made


async def roost(rig, *arguments):
    """The command's exit status."""
    return await asyncio.to_thread(main, ["alias", "adder", *arguments, "--url", rig.url])


def shown(capsys):
    """What the command printed: the gateway in this process logs to the same place."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if not re.match(r"\d{4}-\d\d-\d\d ", line)]


async def test_a_new_alias_is_shown(rig, capsys):
    """And listed; without any it is said what the bare name means."""
    assert await roost(rig) == 0
    assert "newest" in shown(capsys)[0]
    assert await roost(rig, "prod", "1") == 0
    assert await roost(rig) == 0
    assert shown(capsys) == ["prod  ->  version 1"] * 2
    assert await roost(rig, "prod", "--remove") == 0
    assert await roost(rig, "prod") == 1
    assert "no alias 'prod'" in capsys.readouterr().err


async def test_it_waits_until_the_alias_has_flipped(rig, capsys):
    """Shows what it waits for, and what it leads to in the end."""
    await roost(rig, "prod", "1")
    capsys.readouterr()
    running_command = asyncio.create_task(roost(rig, "prod", "2"))
    await until(
        lambda: rig.repository.aliases()["adder"].aliases["prod"].pending or running_command.done()
    )
    await asyncio.to_thread(rig.repository.edit_aliases, "adder", lambda d: d.flip("prod"))
    assert await running_command == 0
    lines = shown(capsys)
    assert lines[0] == "prod  ->  version 1  (to version 2, waits for: the placer)"
    assert lines[-1] == "prod  ->  version 2"


async def test_it_need_not_wait(rig, capsys):
    """For longer than it is told to, or at all."""
    await roost(rig, "prod", "1")
    assert await roost(rig, "prod", "2", "--wait", "0") == 1
    capsys.readouterr()
    assert await roost(rig, "prod", "--split", "1=3,2=1", "--now", "--json") == 0
    assert json.loads("".join(shown(capsys)))["split"] == {"1": 3, "2": 1}


async def test_whoever_is_overtaken_is_told(rig, capsys):
    """The alias leads elsewhere than it was told to."""
    await roost(rig, "prod", "1")
    waiting = asyncio.create_task(roost(rig, "prod", "2"))
    await until(lambda: rig.repository.aliases()["adder"].aliases["prod"].pending or waiting.done())
    await asyncio.to_thread(rig.repository.edit_aliases, "adder", lambda d: d.without("prod"))
    assert await waiting == 1
    assert "somebody else" in capsys.readouterr().err


async def test_contradictions_are_refused(rig, capsys):
    """Before anything is asked."""
    assert await roost(rig, "prod", "1", "--remove") == 1
    assert await roost(rig, "--remove") == 1
    assert await roost(rig, "latest", "1") == 1
    assert "latest" in capsys.readouterr().err


def test_splits_in_text():
    """As they are given, and as they are shown."""
    assert parse_split("3=90, 4=10") == {3: 90, 4: 10}
    for wrong in ("3", "3=", "x=1", "3=1,3=2", "0=1", "3=-1", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_split(wrong)
    assert show_split({"3": 90, "4": 10}) == "3 (90 %), 4 (10 %)"
    assert show_split({"3": 5}) == "version 3"


async def test_the_client_for_asyncio_does_the_same(rig):
    """Aliases, and addresses that are aliases."""
    async with AsyncRoostClient(rig.url) as client:
        assert (await client.set_alias("adder", "prod", {1: 9, 2: 1}))["split"] == {"1": 9, "2": 1}
        assert (await client.metadata("adder", "prod"))["versions"] == ["1"]
        assert [each["alias"] for each in await client.aliases("adder")] == ["prod"]
        await client.remove_alias("adder", "prod")
        with pytest.raises(ModelNotFound):
            await client.metadata("adder", "prod")
