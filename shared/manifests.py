"""Manifests as files: where they lie, what is in them, when two say the same."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final, get_args

import msgspec

from shared.blobs import check_digest
from shared.errors import Internal, InvalidRequest, RoostError
from shared.models import Format, Manifest, ModelSpec, Placement, Scalar
from shared.names import check_name, check_version
from shared.storage import Entry

MODELS: Final = "models"
MANIFEST: Final = "manifest.json"
MAX_MANIFEST_BYTES: Final = 1 << 20

_decode_manifest = msgspec.json.Decoder(Manifest).decode


def new_manifest(
    name: str, version: int, spec: ModelSpec, digest: str, size: int, tenant: str = ""
) -> Manifest:
    fields = {field: getattr(spec, field) for field in ModelSpec.__struct_fields__}
    return Manifest(
        name=name, version=version, digest=digest, size_bytes=size, created_at=time.time(),
        tenant=tenant, **fields,
    )  # fmt: skip


def same_manifest(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests say the same, whenever they were made. The digest implies the size."""
    replace = msgspec.structs.replace
    return replace(one, created_at=0.0, size_bytes=0) == replace(
        other, created_at=0.0, size_bytes=0
    )


_ANYWHERE: Final = Placement()
_NO_PARAMETERS: Final[dict[str, Scalar]] = {}
_FORMATS: Final[dict[Format, Format]] = {name: name for name in get_args(Format)}


def encode_manifest(manifest: Manifest) -> bytes:
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidRequest(f"the specification is larger than {MAX_MANIFEST_BYTES:,} bytes")
    return data


def decode_manifest(path: str, data: bytes) -> Manifest:
    """Raises `Internal` naming the file when it is not the manifest that its path promises."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise Internal(f"{path} is not a valid manifest: it has {len(data):,} bytes")
    try:
        manifest = _decode_manifest(data)
        check_digest(manifest.digest)
    except (msgspec.MsgspecError, ValueError, RecursionError, RoostError) as error:
        raise Internal(f"{path} is not a valid manifest: {error}") from error
    if (manifest.name, manifest.version) != split_path(path):
        raise Internal(f"{path} is not a valid manifest: it is that of {manifest.id}")
    # Every service that lists the registry keeps it decoded: a fifth of it is the same in all.
    placement = _ANYWHERE if manifest.placement == _ANYWHERE else manifest.placement
    return msgspec.structs.replace(
        manifest,
        format=_FORMATS[manifest.format],
        placement=placement,
        parameters=manifest.parameters or _NO_PARAMETERS,
    )


def manifest_path(name: str, version: int) -> str:
    return f"{MODELS}/{name}/{version}/{MANIFEST}"


def split_path(path: str) -> tuple[str, int] | None:
    """Name and version from the path of a file in a version's folder; None for folders that
    are not ours."""
    _, name, version, _ = path.split("/")
    try:
        return check_name(name), check_version(version)
    except InvalidRequest:
        return None


def numbers(found: Iterable[Entry]) -> list[int]:
    """The versions whose files were found, ascending."""
    return sorted(known[1] for entry in found if (known := split_path(entry.path)))
