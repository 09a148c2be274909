from __future__ import annotations

import io
import json
import zipfile

import pytest

from shared.errors import InvalidRequest
from shared.models import ModelSpec
from shared.pt2 import Weight, check_model, choose, exported_bytes, read_package, saved_with
from shared.repository import Repository
from tests.archives import archive, torchscript
from tests.pt2_archives import COMPILED, EXPORTED, FOLDER, NOTE, compiled, exported


def check(data: bytes):
    return check_model(io.BytesIO(data))


def refuse(data: bytes, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        check(data)


def test_the_content_tells_the_format():
    """Nobody has to say what a file is."""
    assert check(torchscript()) == ("torchscript",)
    assert check(exported()) == ("export",)
    assert check(compiled()) == ("aotinductor",)
    assert check(archive({**EXPORTED, **COMPILED})) == ("export", "aotinductor")


def test_the_manifest_may_say_it_and_must_be_right():
    """A format that the file is not is refused; one is needed only where there are two."""
    assert choose(("export",), None) == "export"
    assert choose(("export", "aotinductor"), "aotinductor") == "aotinductor"
    with pytest.raises(InvalidRequest, match="format is torchscript, the file is export"):
        choose(("export",), "torchscript")
    with pytest.raises(InvalidRequest, match='"format": "export" or "aotinductor"'):
        choose(("export", "aotinductor"), None)


def test_registration_gives_the_manifest_its_format(tmp_path):
    """What is stored names the format, whether or not the spec did."""
    repository = Repository(str(tmp_path))
    for name, data in (("ts", torchscript()), ("ep", exported()), ("so", compiled())):
        with repository.files.writer() as writer:
            writer.write(data)
            digest, _ = writer.commit(None)
        repository.register(name, None, ModelSpec(), digest)
        wrong = ModelSpec(format="export" if name != "ep" else "aotinductor")
        with pytest.raises(InvalidRequest, match="the manifest's format is"):
            repository.register(name, None, wrong, digest)
    found = {name: repository.versions.manifest(name).format for name in ("ts", "ep", "so")}
    assert found == {"ts": "torchscript", "ep": "export", "so": "aotinductor"}
    again = repository.register("ep", None, ModelSpec(format="export"), digest_of(repository, "ep"))
    assert again.version == 1


def digest_of(repository, name):
    return repository.versions.manifest(name).digest


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"hello", "not a zip archive, so not TorchScript or .pt2"),
        (exported()[:-50], "truncated"),
        (archive({**EXPORTED, "../../etc/passwd": b""}), "unsafe name"),
        (archive({**COMPILED, f"{FOLDER}../../x.so": b""}), "unsafe name"),
        (archive({**EXPORTED, "data/weights/zeros": bytes(90 << 20)},
                 compression=zipfile.ZIP_DEFLATED), "bomb"),
        (archive(NOTE), "neither an exported program nor a compiled one"),
        (exported(archive_format=b"pt3"), "something else than pt2"),
        (exported(**{"models/other.json": b"{}"}), "holds the programs model, other"),
        (exported(**{name: None for name in EXPORTED if "weights" in name}), "incomplete"),
        (archive({"version": b"2.6", "serialized_exported_program.json": b"{}"}, root=""),
         "before torch 2.8"),
        (compiled(**{f"{FOLDER}abc.wrapper.so": None}), "has 0 compiled libraries"),
        (compiled(**{f"{FOLDER}def.so": b""}), "has 2 compiled libraries"),
        (compiled(**{"data/aotinductor/other/x.so": b""}), "this one model, other"),
        (compiled(**{f"{FOLDER}abc.wrapper_weights.blob": b""}), "binary blob"),
        (compiled(**{f"{FOLDER}abc.wrapper_metadata.json": None}), "for which device"),
        (compiled(**{f"{FOLDER}abc.wrapper_metadata.json": b"{}"}), "for which device"),
        (compiled(**{f"{FOLDER}abc.wrapper_metadata.json": b"{"}), "is damaged"),
        (compiled(**{f"{FOLDER}weights_config.json": b'{"w": ["weight_0", [1], [1], 0]}'}),
         "lacks data/weights/weight_0"),
        (compiled(**{f"{FOLDER}weights_config.json": b'{"w": 3}'}), "is damaged"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_told_apart(data, match):
    """Half files, traps and what has nothing to run are refused by name, before any is stored."""
    refuse(data, match)


def test_weights_are_counted_from_the_directory():
    """No tensor is read to say how large a program is; notes about tensors do not count."""
    assert exported_bytes(io.BytesIO(exported())) == 48 + 8


def test_a_package_says_what_it_needs_and_what_it_is_for():
    """Sources stay in the archive; weights beside the library are found by full name."""
    config = json.dumps({"layer.weight": ["weight_0", [2, 3], [3, 1], 1]}).encode()
    data = compiled(**{f"{FOLDER}weights_config.json": config, "data/weights/weight_0": bytes(40)})
    package = read_package(io.BytesIO(data))
    assert package.library == f"{FOLDER}abc.wrapper.so"
    assert package.source == f"{FOLDER}abc.wrapper.cpp"
    assert set(package.files) == {package.library, f"{FOLDER}abc.wrapper_metadata.json"}
    assert package.notes["AOTI_DEVICE_KEY"] == "cpu"
    weight = Weight("data/weights/weight_0", (2, 3), (3, 1), 1)
    assert package.weights == {"layer.weight": weight}
    assert (package.library_bytes, package.weights_bytes) == (100, 40)


def test_an_exported_program_says_which_torch_saved_it():
    """For the message when another one cannot load it; nothing is said of what does not tell."""
    assert saved_with(io.BytesIO(exported())) == "2.13.0"
    assert saved_with(io.BytesIO(exported(**{"models/model.json": b"{"}))) == ""
    assert saved_with(io.BytesIO(b"no zip")) == ""
