from __future__ import annotations

import hashlib
import time

from roost.commands.models import table
from shared.layout import Block
from shared.models import Manifest, ModelSpec
from shared.repository import Repository
from shared.sharing import LOOK_AGAIN_S, SharedBytes, Sharing
from tests.archives import torchscript as fake
from tests.torchscript_files import weights


def digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def manifest(name: str, file: str, size: int, version: int = 1) -> Manifest:
    return Manifest(
        name=name, version=version, digest=digest(file), size_bytes=size, created_at=0.0,
        format="torchscript",
    )  # fmt: skip


def block(text: str, nbytes: int) -> Block:
    return Block(bytes.fromhex(digest(text)[7:]), 0, nbytes)


def sharing(**files: tuple[Block, ...]) -> Sharing:
    layouts = {digest(name): blocks for name, blocks in files.items()}
    return Sharing(lambda digests: {each: layouts[each] for each in digests if each in layouts})


def test_bytes_are_divided():
    """What another model has too is shared, a tensor that a model has twice is counted twice, and
    the rest of the file is its own."""
    counted = sharing(
        f=(block("a", 100), block("b", 10), block("b", 10)),
        g=(block("a", 100), block("c", 30)),
        h=(block("d", 5), block("d", 5)),
    ).count([manifest("x", "f", 150), manifest("y", "g", 140), manifest("z", "h", 20)])
    assert counted == {
        "x/1": SharedBytes(50, 100), "y/1": SharedBytes(40, 100), "z/1": SharedBytes(20, 0),
    }  # fmt: skip


def test_files_without_a_layout_are_one_piece():
    """Such a file is shared when it is registered twice."""
    counted = sharing(f=(block("a", 100),)).count(
        [manifest("x", "old", 50), manifest("y", "old", 50), manifest("z", "other", 60)]
    )
    assert counted["x/1"] == counted["y/1"] == SharedBytes(0, 50)
    assert counted["z/1"] == SharedBytes(60, 0)


def test_nothing_is_divided_of_nothing():
    """An empty repository has no bytes."""
    assert sharing().count([]) == {}


def test_registrations_change_the_count(tmp_path):
    """Each listing tells what is registered then."""
    repository = Repository(str(tmp_path))
    one, other = (weights(a=b"abcd" * 100, b=own.encode() * 100) for own in ("1111", "2222"))
    repository.register("one", 1, ModelSpec(), repository.files.put([one])[0])
    repository.register("odd", 1, ModelSpec(), repository.files.put([fake()])[0])
    assert repository.sharing()["one/1"] == SharedBytes(len(one), 0)
    repository.register("other", 1, ModelSpec(), repository.files.put([other])[0])
    assert repository.sharing()["one/1"] == SharedBytes(len(one) - 400, 400)
    assert repository.sharing()["other/1"] == SharedBytes(len(other) - 400, 400)
    assert repository.sharing()["odd/1"] == SharedBytes(len(fake()), 0)
    repository.remove("other")
    assert repository.sharing()["one/1"] == SharedBytes(len(one), 0)


def test_thousands_of_models_are_counted_at_once():
    """Counting 5,000 models of 200 tensors takes no time that anybody would notice, and looking
    again takes none."""
    backbone = [block(f"backbone {number}", 1000) for number in range(190)]
    files = {
        digest(f"f{number}"): (*backbone, *(block(f"{number} {own}", 10) for own in range(10)))
        for number in range(5000)
    }
    read: list[str] = []

    def blocks(digests):
        read.extend(digests)
        return {each: files[each] for each in digests}

    count = Sharing(blocks).count
    manifests = [manifest("m", f"f{number}", 200_000, number + 1) for number in range(5000)]
    assert count(manifests)["m/1"] == SharedBytes(10_000, 190_000)
    started = time.monotonic()
    count([*manifests[1:], manifest("n", "f0", 200_000)])
    assert time.monotonic() - started < 3
    assert len(read) == 5000


def test_the_listing_shows_own_and_shared_bytes():
    """`roost ls` prints both, and does without where a gateway does not tell."""
    index = [
        {"name": "a", "version": "1", "state": "READY", "reason": "disk", "size_bytes": 3_000_000,
         "own_bytes": 1_000_000, "shared_bytes": 2_000_000},
        {"name": "longer", "version": "12", "state": "READY", "reason": ""},
    ]  # fmt: skip
    lines = table(index)
    assert lines[0].split() == ["MODEL", "VERSION", "STATE", "SIZE", "OWN", "SHARED", "WHERE"]
    assert lines[1].split() == ["a", "1", "READY", "3", "MB", "1", "MB", "2", "MB", "disk"]
    assert lines[2].split() == ["longer", "12", "READY"]


def test_files_without_a_layout_are_not_read_at_every_count():
    """They are looked at again after a while: a worker makes the layout of an old file."""
    asked: list[set[str]] = []
    layouts: dict[str, tuple[Block, ...]] = {}
    now = 100.0

    def blocks(digests):
        asked.append(set(digests))
        return {each: layouts[each] for each in digests if each in layouts}

    counting = Sharing(blocks, clock=lambda: now)
    old, new = manifest("x", "old", 50), manifest("y", "new", 60)
    counting.count([old])
    counting.count([old])
    counting.count([old, new])
    assert asked == [{digest("old")}, {digest("new")}]
    layouts |= {digest(name): (block("a", 40),) for name in ("old", "new")}
    now += LOOK_AGAIN_S
    assert counting.count([old, new])["x/1"] == SharedBytes(10, 40)
    assert len(asked) == 3
