"""`.pt2` files: `torch.export` programs and AOTInductor packages. Told apart, checked and described
without torch.

Like a TorchScript file, either is a program that whoever loads it runs: the one may carry pickles,
the other is native code. The check makes no file safe; it finds what is no model, what is half of
one, and what was built to fill a disk or a memory. It reads the zip's directory and a few small
entries, no weights.
"""

from __future__ import annotations

import re
from typing import BinaryIO, Final, NamedTuple, TypeVar

import msgspec

from shared.archive import Archive, check_torchscript, read_archive
from shared.errors import InvalidRequest
from shared.layout.records import Records, Unreadable
from shared.models import Format

_WHAT: Final = "TorchScript or .pt2"
_HINT: Final = (
    "export with torch.export.save, torch._inductor.aoti_compile_and_package, "
    "or torch.jit.trace/script and .save()"
)
_OLD_EXPORT: Final = b"serialized_exported_program.json"
_PROGRAM: Final = re.compile(r"models/([^/]+)\.json\Z")
_COMPILED: Final = "data/aotinductor/"
_WEIGHTS: Final = "data/weights/"
_CONSTANTS: Final = "data/constants/"
_SOURCES: Final = (".cpp", ".h", ".S", ".o")
"""In a package for people to read and to build anew; not needed to run it."""
_MAX_PROGRAM_BYTES: Final = 512 << 20
"""A graph is parsed as a whole; that of a large language model has some 50 MB."""
_MAX_NOTE_BYTES: Final = 16 << 20
"""Of an entry that is read here."""

T = TypeVar("T")
_notes = msgspec.json.Decoder(dict[str, str | int | float | bool | None])


class Weight(NamedTuple):
    """A constant that lies beside the compiled library: a view into a pickled tensor."""

    member: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    """In elements, like the stride."""


class Package(NamedTuple):
    """An AOTInductor package. Members are named below the archive's root."""

    root: str
    library: str
    """The compiled code."""
    source: str | None
    """What the library was compiled from."""
    files: tuple[str, ...]
    """All that must lie in one folder for the library to run, itself included."""
    notes: dict[str, str]
    """What it was compiled for: `AOTI_DEVICE_KEY`, `AOTI_MACHINE`, …"""
    weights: dict[str, Weight]
    """By the constant's full name; empty when they are in the library."""
    library_bytes: int
    weights_bytes: int


def check_model(file: BinaryIO) -> tuple[Format, ...]:
    """What the file can be run as: one format, or two for a `.pt2` that holds a program both as
    exported and as compiled. Raises `InvalidRequest`, saying what it is instead.

    The file must be seekable; it is left open, wherever the reading ended.
    """
    archive = _read(file)
    if not _is_pt2(archive):
        check_torchscript(file)
        return ("torchscript",)
    records = Records(file, archive)
    if _note(records, "archive_format") != b"pt2":
        raise InvalidRequest("the archive calls itself something else than pt2")
    formats: list[Format] = []
    programs = {match[1] for name in archive.members if (match := _PROGRAM.match(name))}
    if programs:
        _check_program(archive, programs)
        formats.append("export")
    if any(name.startswith(_COMPILED) for name in archive.members):
        _package(archive, records)
        formats.append("aotinductor")
    if not formats:
        raise InvalidRequest("a .pt2 archive, but neither an exported program nor a compiled one")
    return tuple(formats)


def choose(formats: tuple[Format, ...], said: Format | None) -> Format:
    """The format as which a file is registered. Raises `InvalidRequest` when it is not what the
    manifest says, or when the manifest must say which of two."""
    if said is None:
        if len(formats) == 1:
            return formats[0]
        raise InvalidRequest(
            f'the file holds the model in several formats; say "format": "{formats[0]}" or '
            f'"{formats[1]}" in the manifest'
        )
    if said not in formats:
        raise InvalidRequest(f"the manifest's format is {said}, the file is {formats[0]}")
    return said


def exported_bytes(file: BinaryIO) -> int:
    """Of an exported program's weights and constants, told from the zip's directory alone. Raises
    `InvalidRequest` when it is none."""
    return _stored_bytes(_read(file), (_WEIGHTS, _CONSTANTS))


def read_package(file: BinaryIO) -> Package:
    """Raises `InvalidRequest` for what is no AOTInductor package, or not ready to run."""
    archive = _read(file)
    return _package(archive, Records(file, archive))


def saved_with(file: BinaryIO) -> str:
    """The version of torch that saved an exported program; empty when it does not say. Reads the
    whole program: for messages."""
    try:
        archive = _read(file)
        data = Records(file, archive).read("models/model.json", _MAX_PROGRAM_BYTES)
        return msgspec.json.decode(data, type=_Saved).torch_version
    except (InvalidRequest, Unreadable, ValueError, RecursionError):  # msgspec's are ValueErrors
        return ""


class _Saved(msgspec.Struct):
    torch_version: str = ""


def _read(file: BinaryIO) -> Archive:
    try:
        return read_archive(file, _WHAT, _HINT)
    except InvalidRequest:
        if _is_old_export(file):
            raise InvalidRequest(
                "an exported program in the format before torch 2.8: save it again with a newer one"
            ) from None
        raise


def _is_old_export(file: BinaryIO) -> bool:
    """That format was a zip without a root folder, the program among its first entries."""
    file.seek(0)
    return _OLD_EXPORT in file.read(4096)


def _is_pt2(archive: Archive) -> bool:
    return "archive_format" in archive.members


def _stored_bytes(archive: Archive, folders: tuple[str, ...]) -> int:
    return sum(
        member.nbytes
        for name, member in archive.members.items()
        if name.startswith(folders) and not name.endswith(".json")
    )


def _check_program(archive: Archive, programs: set[str]) -> None:
    if programs != {"model"}:
        named = ", ".join(sorted(programs))[:200]
        raise InvalidRequest(f"the file holds the programs {named}; torch.export.save writes one")
    if archive.members["models/model.json"].nbytes > _MAX_PROGRAM_BYTES:
        raise InvalidRequest(f"the exported graph has more than {_MAX_PROGRAM_BYTES:,} bytes")
    for folder in (_WEIGHTS, _CONSTANTS):
        if not any(name.startswith(folder) for name in archive.members):
            raise InvalidRequest(f"an exported program without {folder}: the file is incomplete")


def _package(archive: Archive, records: Records) -> Package:
    compiled = [name for name in archive.members if name.startswith(_COMPILED)]
    models = {name.split("/")[2] for name in compiled}
    if len(models) != 1:
        named = ", ".join(sorted(models))[:200] or "none"
        raise InvalidRequest(f"an AOTInductor package holds one model, this one {named}")
    libraries = [name for name in compiled if name.endswith(".so")]
    if len(libraries) != 1:
        raise InvalidRequest(
            f"the AOTInductor package has {len(libraries)} compiled libraries, not one: "
            "package it without package_cpp_only"
        )
    if any(name.endswith(".blob") for name in compiled):
        raise InvalidRequest(
            "the package's weights are a binary blob: package them in the library, or with "
            "package_constants_on_disk_format='pickle_weights'"
        )
    library = libraries[0]
    source = f"{library.removesuffix('.so')}.cpp"
    weights = _weights(records, f"{_COMPILED}{models.pop()}/weights_config.json")
    missing = [each.member for each in weights.values() if each.member not in archive.members]
    if missing:
        raise InvalidRequest(f"the package lacks {missing[0][:80]}")
    return Package(
        archive.root,
        library,
        source if source in archive.members else None,
        tuple(name for name in compiled if not name.endswith((*_SOURCES, "weights_config.json"))),
        _target(records, library, compiled),
        weights,
        archive.members[library].nbytes,
        sum(archive.members[name].nbytes for name in {each.member for each in weights.values()}),
    )


def _target(records: Records, library: str, compiled: list[str]) -> dict[str, str]:
    """The library's own notes, or those of any other part."""
    own = f"{library.removesuffix('.so')}_metadata.json"
    for name in sorted(compiled, key=lambda name: name != own):
        if name.endswith("_metadata.json"):
            notes = _decoded(name, _note(records, name), _notes)
            if "AOTI_DEVICE_KEY" in notes:
                return {key: str(value) for key, value in notes.items() if value is not None}
    raise InvalidRequest("the AOTInductor package does not say for which device it was compiled")


_placements = msgspec.json.Decoder(dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int]])


def _weights(records: Records, config: str) -> dict[str, Weight]:
    if config not in records:
        return {}
    found = _decoded(config, _note(records, config), _placements)
    return {
        name: Weight(_WEIGHTS + file, shape, stride, start)
        for name, (file, shape, stride, start) in found.items()
    }


def _note(records: Records, name: str) -> bytes:
    try:
        return records.read(name, _MAX_NOTE_BYTES)
    except Unreadable as error:
        raise InvalidRequest(f"the .pt2 archive is damaged: {error}") from error


def _decoded(name: str, data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{name[:80]} is damaged: {error}") from error
