from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
import uuid
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared.archive import check_torchscript
from shared.errors import AlreadyExists, InvalidRequest, ModelNotFound
from shared.models import ModelSpec
from shared.repository import Repository
from shared.triton import read_config, with_colons
from tests.archives import torchscript
from tests.torchscript_files import weights as weights_file

WHOLE = torchscript()


@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=8),
    st.integers(0, len(WHOLE)),
    st.binary(max_size=40),
)
@settings(max_examples=500, deadline=None)
def test_a_damaged_archive_is_refused_or_passes(changes, length, tail):
    """Whatever happened to a file, the check answers; it never fails in another way."""
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    for candidate in (data, data[:length], data[:length] + tail + data[length:]):
        with contextlib.suppress(InvalidRequest):
            check_torchscript(io.BytesIO(bytes(candidate)))


@given(st.text(alphabet="abc_:[]{}<>\"'#\\ \n,01.-", max_size=60) | st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_configuration_or_refused(text):
    """No text makes reading a configuration fail in another way; adding colons adds no more."""
    assert with_colons(with_colons(text)) == with_colons(text)
    with contextlib.suppress(InvalidRequest):
        read_config(text)


def model(number: int) -> bytes:
    """A file that has a large tensor in common with one of the others, or none that is large."""
    if number == 3:
        return torchscript(b"3")
    return weights_file(a=bytes(70_000), b=bytes([number]) * 70_000)


FILES = {number: model(number) for number in (1, 2, 3)}


class RepositoryMachine(RuleBasedStateMachine):
    """A repository beside a dict that says what it should hold."""

    def __init__(self):
        super().__init__()
        self.repository = Repository(f"memory://{uuid.uuid4().hex}")
        self.expected: dict[tuple[str, int], tuple[str, float]] = {}
        self.ever: dict[tuple[str, int], tuple[str, float]] = {}
        """What each number meant first, and so for ever."""

    names = st.sampled_from(["a", "b.c"])
    versions = st.integers(1, 3)

    @rule(name=names, version=st.none() | versions, weights=versions, target_ms=versions)
    def register(self, name, version, weights, target_ms):
        digest, _ = self.repository.files.put([FILES[weights]])
        spec = ModelSpec(target_ms=float(target_ms))
        content = (digest, float(target_ms))
        newest = max((v for n, v in self.expected if n == name), default=0)
        number = version
        if number is None:
            same = self.expected.get((name, newest)) == content
            number = newest if same else 1 + max((v for n, v in self.ever if n == name), default=0)
        if self.ever.setdefault((name, number), content) == content:
            self.expected[name, number] = content
            manifest = self.repository.register(name, version, spec, digest)
            assert manifest.version == number
        else:
            try:
                self.repository.register(name, version, spec, digest)
            except AlreadyExists:
                return
            raise AssertionError("a number was used for two contents")

    @rule(name=names, version=st.none() | versions)
    def remove(self, name, version):
        gone = [k for k in self.expected if k[0] == name and version in {None, k[1]}]
        try:
            self.repository.remove(name, version)
        except ModelNotFound:
            assert not gone
        else:
            assert gone
        for key in gone:
            del self.expected[key]

    @rule()
    def collect(self):
        self.repository.collect_garbage(0.0)
        used = {digest for digest, _ in self.expected.values()}
        for weights in (1, 2, 3):
            digest = digest_of(FILES[weights])
            if digest in used:
                with tempfile.TemporaryDirectory() as cache:
                    path = self.repository.files.path(digest, cache)
                    assert Path(path).read_bytes() == FILES[weights]

    @invariant()
    def holds_what_it_should(self):
        listed = {
            (m.name, m.version): (m.digest, m.target_ms)
            for m in self.repository.versions.manifests()
        }
        assert listed == self.expected
        assert list(self.repository.versions.names()) == sorted({name for name, _ in listed})
        for name in ("a", "b.c"):
            assert self.repository.versions.numbers(name) == sorted(
                v for n, v in listed if n == name
            )


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


RepositoryMachine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=15, deadline=None
)
TestRepository = RepositoryMachine.TestCase
