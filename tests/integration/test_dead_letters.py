"""`roost dead`, over the twin of the broker and, where it matters, on RabbitMQ: what it shows,
sends again, removes, and leaves alone."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time

import msgspec
import pytest

from roost.__main__ import build_parser
from roost.commands import dead
from roost.deadletters import held, letter_of
from shared import names
from shared.broker.amqp import AmqpBroker
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.messages import dead_letter
from shared.broker.port import Message
from shared.errors import InvalidRequest, ModelNotFound

QUEUE = "roost.model.bert.1"
BODY = json.dumps(
    {
        "id": "r1",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [41.5, 42.5, 43.5]}],
    }
).encode()


class Rig:
    def __init__(self) -> None:
        self.exchange = MemoryExchange()
        self.broker = MemoryBroker(self.exchange, "roost dead")

    async def die(self, n: int, reason="it ended 2 engines", queue=QUEUE, key="bert", **more):
        """A request that died, of which `n` is told apart."""
        message = Message(
            **{
                "body": BODY,
                "reply_to": "roost.reply.gone",
                "correlation_id": f"c{n}",
                "message_id": f"m{n}",
                "headers": {names.HEADER_DEADLINE: 5, "mine": n},
                **more,
            }
        )
        letter = dead_letter(message, queue, key, reason)
        await self.broker.publish(names.DEAD, "", letter)

    def letters(self) -> list[str]:
        """What lies there, by correlation, in order."""
        ready = sorted(self.exchange.queues[names.DEAD].ready)
        return [entry.message.correlation_id for entry in ready]

    def passed_on(self, queue=names.UNROUTED) -> list[Message]:
        return [entry.message for entry in sorted(self.exchange.queues[queue].ready)]


@pytest.fixture
async def rig(monkeypatch):
    made = Rig()
    await made.broker.start()
    monkeypatch.setattr(dead, "_quarantined", lambda _: frozenset())  # a gateway's word
    yield made
    await made.broker.close()


def asked(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["dead", *arguments])


async def command(rig: Rig, *arguments: str) -> int:
    parsed = asked(*arguments)
    return await parsed.work(rig.broker, parsed)


async def ids(rig: Rig) -> list[str]:
    async with held(rig.broker, 100) as (letters, _):
        return [letter.id for letter in letters]


async def test_looking_takes_nothing_and_changes_no_order(rig, capsys):
    """However often, and also when fewer are looked at than there are."""
    for n in range(5):
        await rig.die(n)
    for limit in ("100", "2", "100"):
        assert await command(rig, "ls", "--limit", limit) == 0
        assert rig.letters() == ["c0", "c1", "c2", "c3", "c4"]
    told = capsys.readouterr().out
    assert "looked at the oldest 2 of 5" in told
    assert "bert/1" in told
    assert "it ended 2 engines" in told


async def test_an_empty_queue_says_so(rig, capsys):
    """And is no failure."""
    assert await command(rig, "ls") == 0
    assert capsys.readouterr().out == "no dead letters\n"


async def test_a_letter_has_the_same_id_at_every_look(rig):
    """So that what ls told can be asked for; the same content has the same one."""
    await rig.die(1)
    await rig.die(2)
    first = await ids(rig)
    assert first == await ids(rig)
    assert len(set(first)) == 2


async def test_show_tells_all_but_the_tensors(rig, capsys):
    """Reason, queue, properties and the request's JSON; values are counted."""
    await rig.die(1)
    (one,) = await ids(rig)
    assert await command(rig, "show", one[:4], "--json") == 0
    text = capsys.readouterr().out
    (told,) = json.loads(text)
    assert told["reason"] == "it ended 2 engines"
    assert (told["model"], told["queue"], told["routing_key"]) == ("bert/1", QUEUE, "bert")
    assert told["properties"]["reply_to"] == "roost.reply.gone"
    assert told["properties"]["headers"]["mine"] == 1
    assert told["request"]["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": "3 values"}
    ]
    assert "42.5" not in text
    assert rig.letters() == ["c1"]


@pytest.mark.parametrize(
    ("body", "headers", "told"),
    [
        (b"\x00" * 12, {names.HEADER_LENGTH: 0}, "one raw tensor and nothing else"),
        (b'{"inputs":[]}RAW', {names.HEADER_LENGTH: 13}, {"inputs": []}),
        (b"garbage", {}, "no request that can be read"),
        (b"{}", {names.HEADER_LENGTH: "soon"}, "no request that can be read"),
        (b"[" * 100_000, {}, "no request that can be read"),
    ],
)
async def test_show_reads_whatever_died(rig, capsys, body, headers, told):
    """A body that is no request is the usual reason to be here."""
    await rig.die(1, body=body, headers=headers)
    assert await command(rig, "show", "--model", "bert", "--json") == 0
    (shown,) = json.loads(capsys.readouterr().out)
    if isinstance(told, str):
        assert shown["request"].startswith(told)
    else:
        assert shown["request"] == told


async def test_the_body_is_saved_only_where_it_is_asked_for(rig, tmp_path, capsys):
    """Bit by bit, and of a single letter."""
    await rig.die(1)
    file = tmp_path / "body"
    assert await command(rig, "show", "--model", "bert/1", "--save", str(file)) == 0
    assert file.read_bytes() == BODY
    await rig.die(2)
    with pytest.raises(InvalidRequest, match="these are 2"):
        await command(rig, "show", "--model", "bert", "--save", str(file))
    assert rig.letters() == ["c1", "c2"]
    capsys.readouterr()


async def test_replay_sends_them_as_they_were_and_takes_them_out(rig, capsys):
    """To the exchange, under their routing key, with what the producer said, without what was
    said of their death, and without the deadline that has passed."""
    for n in range(3):
        await rig.die(n)
    first, second, _ = await ids(rig)
    assert await command(rig, "replay", second, first) == 0
    assert rig.letters() == ["c2"]
    sent = rig.passed_on()
    assert [each.correlation_id for each in sent] == ["c0", "c1"]
    assert sent[0].body == BODY
    assert sent[0].reply_to == "roost.reply.gone"
    assert sent[0].headers["mine"] == 0
    assert not [name for name in sent[0].headers if "dead" in name]
    assert capsys.readouterr().out.count("sent to bert") == 2


async def test_what_the_placer_had_passed_on_is_sent_to_its_version(rig, capsys):
    """Its routing key was the queue's name, which no exchange knows."""
    rig.exchange.bindings["bert/1"] = {QUEUE}
    rig.exchange.declare(QUEUE)
    await rig.die(1, key=QUEUE)
    assert await command(rig, "replay", "--all") == 0
    assert len(rig.passed_on(QUEUE)) == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    "letter",
    [
        {"queue": "roost.reply.x", "key": "roost.reply.x"},
        {"headers": {names.HEADER_RAW_PROPERTIES: "AAA="}},
    ],
)
async def test_what_cannot_be_sent_again_stays(rig, capsys, letter):
    """With the reason, and the others go."""
    await rig.die(1, **letter)
    await rig.die(2)
    assert await command(rig, "replay", "--all") == 1
    assert rig.letters() == ["c1"]
    assert "stays: " in capsys.readouterr().out


async def test_a_letter_whose_publish_fails_stays(rig, capsys):
    """It goes only once the broker has confirmed the other one."""
    rig.exchange.max_length[names.UNROUTED] = 1
    await rig.die(1)
    await rig.die(2)
    assert await command(rig, "replay", "--all") == 1
    assert (len(rig.passed_on()), rig.letters()) == (1, ["c2"])
    capsys.readouterr()


@pytest.mark.parametrize("quarantined", ["bert/1", "bert/2"])
async def test_to_a_quarantined_model_nothing_is_sent(rig, monkeypatch, capsys, quarantined):
    """It would be answered to nobody, and be lost. A bare name may mean any version."""
    monkeypatch.setattr(dead, "_quarantined", lambda _: frozenset({quarantined}))
    await rig.die(1, queue=names.UNROUTED)
    assert await command(rig, "replay", "--all") == 1
    assert rig.letters() == ["c1"]
    assert f"{quarantined} is quarantined" in capsys.readouterr().out
    assert await command(rig, "replay", "--all", "--force") == 0
    assert (rig.letters(), len(rig.passed_on())) == ([], 1)


async def test_purge_removes_what_is_meant(rig, capsys):
    """By model, by reason, by id; the others keep their order."""
    for n, queue in enumerate((QUEUE, "roost.model.bert.2", "roost.model.bert-2.1", QUEUE)):
        await rig.die(n, queue=queue, reason="odd" if n == 3 else "it ended 2 engines")
    assert await command(rig, "purge", "--model", "bert/1", "--reason", "odd") == 0
    assert rig.letters() == ["c0", "c1", "c2"]
    assert await command(rig, "purge", "--model", "bert") == 0
    assert rig.letters() == ["c2"]
    assert "removed 2 of 3" in capsys.readouterr().out
    with pytest.raises(ModelNotFound):
        await command(rig, "purge", "--model", "gpt")


async def test_purge_of_all_wants_a_yes(rig, capsys):
    """So does replay; an empty id means nobody."""
    await rig.die(1)
    for action in (("purge",), ("replay",), ("show",), ("purge", "")):
        with pytest.raises(InvalidRequest):
            await command(rig, *action)
    assert rig.letters() == ["c1"]
    assert await command(rig, "purge", "--yes") == 0
    assert rig.letters() == []
    capsys.readouterr()


async def test_by_age(rig, capsys):
    """Of whom nobody said when it died is not older than anything."""
    for n, ago_s in enumerate((7200, 60)):
        await rig.die(n)
        entry = max(rig.exchange.queues[names.DEAD].ready)
        at = int((time.time() - ago_s) * 1000)
        entry.message.headers[names.HEADER_DEAD_AT] = at
    await rig.broker.publish(names.DEAD, "", Message(body=b"", correlation_id="nobody knows"))
    assert await command(rig, "purge", "--older-than", "1h") == 0
    assert rig.letters() == ["c1", "nobody knows"]
    capsys.readouterr()


@pytest.mark.parametrize("text", ["1", "h", "-1h", "1.5h", "1w", "1 h"])
def test_what_is_no_age_is_told(text, capsys):
    """As a usage error."""
    with pytest.raises(SystemExit):
        asked("purge", f"--older-than={text}")
    assert "is no age" in capsys.readouterr().err


async def test_what_strangers_wrote_moves_no_cursor(rig, capsys):
    """Reasons and ids may hold anything."""
    await rig.die(1, reason="\x1b[2Jgone\n", correlation_id="\x1b]0;x")
    await command(rig, "ls")
    await command(rig, "show", "--model", "bert")
    assert "\x1b" not in capsys.readouterr().out


async def test_anything_may_lie_there(rig, capsys):
    """Not only what Roost put there."""
    odd = {
        names.HEADER_DEAD_REASON: b"\xff\x00",
        names.HEADER_DEAD_QUEUE: 7,
        names.HEADER_DEAD_AT: True,
        names.HEADER_DEAD_ROUTING_KEY: None,
    }
    await rig.broker.publish(names.DEAD, "", Message(body=b"", headers=odd))
    await rig.die(1, queue="roost.model.bert", key="../x")
    assert await command(rig, "ls") == 0
    assert await command(rig, "show", "--older-than", "0s", "--json") == 0
    capsys.readouterr()


def test_the_id_is_of_all_that_matters():
    """Another header, another body, another asker: another letter."""

    class Delivered(msgspec.Struct):
        message: Message
        malformed: str | None = None

    base = Message(body=b"1")
    others = [
        Message(body=b"2"),
        Message(body=b"1", headers={"a": 1}),
        Message(body=b"1", correlation_id="c"),
        Message(body=b"1", reply_to="r"),
    ]
    found = {letter_of(Delivered(each)).id for each in (base, *others)}
    assert len(found) == 5


# --- on RabbitMQ ---


@pytest.fixture
async def amqp(amqp_url):
    opened = AmqpBroker(amqp_url, "test")
    await opened.start()
    yield opened
    await opened.close()


async def _lay_down(broker: AmqpBroker, count: int) -> None:
    for n in range(count):
        message = Message(body=BODY, correlation_id=f"c{n}")
        await broker.publish(names.DEAD, "", dead_letter(message, QUEUE, "bert", "it died"))


async def _look(broker: AmqpBroker, limit: int = 100) -> list[str | None]:
    async with held(broker, limit) as (letters, _):
        return [letter.message.correlation_id for letter in letters]


async def test_rabbitmq_has_all_of_them_back_in_their_order(amqp):
    """After looks of several sizes, one of which acknowledges some."""
    await _lay_down(amqp, 8)
    for limit in (100, 3, 100):
        assert (await _look(amqp, limit))[:3] == ["c0", "c1", "c2"]
    async with held(amqp, 6) as (letters, there):
        assert there == 8
        for each in letters[1:4]:
            await each.delivery.ack()
    assert await _look(amqp) == ["c0", "c4", "c5", "c6", "c7"]


async def test_a_command_that_is_killed_loses_nothing(amqp, amqp_url):
    """kill -9 while it holds them: RabbitMQ has them back, in their order."""
    await _lay_down(amqp, 5)
    holding = (
        "import asyncio, sys\n"
        "from roost.deadletters import held\n"
        "from shared.connect import open_broker\n"
        "async def main():\n"
        "    broker = open_broker(sys.argv[1], 'killed')\n"
        "    await broker.start()\n"
        "    async with held(broker, 100) as (letters, _):\n"
        "        print(len(letters), flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", holding, amqp_url, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while (said := await process.stdout.readline()).strip() != b"5":
            assert said, "it ended before it held them"
    assert await amqp.depth(names.DEAD) == 0
    process.kill()
    await process.wait()
    async with asyncio.timeout(30):
        while await amqp.depth(names.DEAD) != 5:
            await asyncio.sleep(0.05)
    assert await _look(amqp) == [f"c{n}" for n in range(5)]
