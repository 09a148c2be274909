"""Other servers' model repositories, taken over into ours."""

from __future__ import annotations

from typing import Final

from shared.errors import RoostError, Unavailable
from shared.models import Manifest
from shared.repository import Repository
from shared.triton import scan

_READ_BYTES: Final = 1 << 20


def import_triton(
    repository: Repository, directory: str
) -> tuple[list[Manifest], dict[str, RoostError]]:
    """Registers every model version of a Triton model repository (a path or fsspec URL).

    Returns the manifests, and the errors by `<model>` or `<model>/<version>`: a model that
    cannot be imported does not keep the others out. Importing again changes nothing. Raises what
    `shared.triton.scan` raises.
    """
    manifests: list[Manifest] = []
    errors: dict[str, RoostError] = {}
    for found in scan(directory):
        if isinstance(found.content, RoostError):
            errors[found.label] = found.content
            continue
        try:
            with found.content.open() as file:
                digest, _ = repository.files.put(iter(lambda: file.read(_READ_BYTES), b""))
            version, spec = found.content.version, found.content.spec
            manifests.append(repository.register(found.content.name, version, spec, digest))
        except RoostError as error:
            errors[found.label] = error
        except OSError as error:
            errors[found.label] = Unavailable(f"cannot be read: {error.strerror or error}")
    return manifests, errors
