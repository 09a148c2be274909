"""The body of a `load`: a configuration and files that the client brings along.

Triton's repository extension: `{"parameters": {"config": "<JSON of a ModelConfig>",
"file:<version>/<file>": "<base64>"}}`, all optional, files only together with a configuration.
What they say becomes a registration; see docs/http.md.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Any, Final, get_args

import msgspec

from shared.errors import InvalidRequest
from shared.models import Datatype, Format, ModelSpec, Scalar, TensorSpec
from shared.names import check_version

_FILE: Final = re.compile(r"file:([0-9]{1,10})/([^/]{1,255})\Z")
_ESCAPE: Final = re.compile(rb"\\")
_PIECE: Final = 1 << 20
"""Characters of base64 at once; a multiple of 4."""
_CONFIG_BYTES: Final = 1 << 20
_MOST_QUOTES: Final = 1 << 17
"""In a body: base64 has none, so that many are enough for any configuration. Each parameter has
two, and takes far more memory than it has bytes."""
_FORMATS: Final[dict[str, Format]] = {
    "pytorch_libtorch": "torchscript",
    "torch_export": "export",
    "torch_aoti": "aotinductor",
}
_DATATYPES: Final[dict[str, Datatype]] = {
    "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}": name for name in get_args(Datatype)
}


class Override(msgspec.Struct, frozen=True):
    """One file that came with a `load`, still in base64."""

    version: int
    raw: msgspec.Raw
    """A JSON string."""

    def pieces(self) -> Iterator[bytes]:
        """Its bytes. Raises `InvalidRequest` where they are no base64."""
        raw = memoryview(self.raw)
        if len(raw) < 2 or raw[0] != ord('"'):
            raise InvalidRequest("a file must be a string of base64")
        text = raw[1:-1]
        if _ESCAPE.search(text):  # as '/' may be
            try:
                text = memoryview(msgspec.json.decode(raw, type=str).encode())
            except ValueError as error:
                raise InvalidRequest(f"a file is no string: {str(error)[:200]}") from None
        if len(text) % 4:
            raise InvalidRequest("a file's base64 is cut off: its length is no multiple of 4")
        for start in range(0, len(text), _PIECE):
            try:
                yield base64.b64decode(text[start : start + _PIECE], validate=True)
            except (binascii.Error, ValueError) as error:
                raise InvalidRequest(f"a file is not base64: {error}") from None


class Loading(msgspec.Struct, frozen=True):
    """What a `load` brings along."""

    config: TritonConfig | None = None
    files: tuple[Override, ...] = ()


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    data_type: str
    dims: tuple[int, ...] = ()
    optional: bool = False
    reshape: dict[str, Any] | None = None


class _Parameter(msgspec.Struct, frozen=True):
    string_value: str = ""


class _Batching(msgspec.Struct, frozen=True):
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    default_priority_level: int = 0


class TritonConfig(msgspec.Struct, frozen=True):
    """Triton's ModelConfig as JSON, as far as it means something here. A field that is left out
    is None, and stays as it is."""

    name: str = ""
    backend: str = ""
    platform: str = ""
    max_batch_size: int | None = None
    input: tuple[_Tensor, ...] | None = None
    output: tuple[_Tensor, ...] | None = None
    dynamic_batching: _Batching | None = None
    sequence_batching: dict[str, Any] | None = None
    ensemble_scheduling: dict[str, Any] | None = None
    parameters: dict[str, _Parameter] | None = None

    def spec(self, name: str, present: ModelSpec) -> ModelSpec:
        """`present`, as far as this configuration says nothing else. Raises `InvalidRequest`
        when it is not one for us."""
        if self.name not in {"", name}:
            raise InvalidRequest(f"the config is of model {self.name[:128]!r}, not of {name!r}")
        if self.backend not in {"", "pytorch"}:
            raise InvalidRequest(f"the config has the backend {self.backend[:80]!r}, not 'pytorch'")
        if self.platform and self.platform not in _FORMATS:
            raise InvalidRequest(
                f"the config has the platform {self.platform[:80]!r}, expected one of "
                + ", ".join(_FORMATS)
            )
        for field in ("sequence_batching", "ensemble_scheduling"):
            if getattr(self, field) is not None:
                raise InvalidRequest(f"the config has {field}, which is not supported")
        changes: dict[str, Any] = {}
        if self.platform:
            changes["format"] = _FORMATS[self.platform]
        if self.max_batch_size is not None:
            changes["max_batch_size"] = self.max_batch_size
        for field, tensors in (("inputs", self.input), ("outputs", self.output)):
            if tensors is not None:
                changes[field] = tuple(map(_spec, tensors)) or None
        if self.dynamic_batching is not None:
            changes["preferred_batch_size"] = self.dynamic_batching.preferred_batch_size
            changes["max_queue_delay_us"] = self.dynamic_batching.max_queue_delay_microseconds
            changes["default_priority_level"] = self.dynamic_batching.default_priority_level
        if self.parameters is not None:
            changes["parameters"] = _parameters(self.parameters, present.parameters)
        fields = {field: getattr(present, field) for field in ModelSpec.__struct_fields__}
        return ModelSpec(**fields | changes)  # anew, not replaced: its rules are checked


def _spec(tensor: _Tensor) -> TensorSpec:
    if tensor.reshape is not None:  # would change the answers
        raise InvalidRequest(
            f"the config's tensor {tensor.name[:128]!r} has a reshape, which is not supported"
        )
    datatype = _DATATYPES.get(tensor.data_type)
    if datatype is None:
        raise InvalidRequest(
            f"the config's tensor {tensor.name[:128]!r} has the data_type "
            f"{tensor.data_type[:40]!r}, expected one of {', '.join(_DATATYPES)}"
        )
    return TensorSpec(tensor.name, datatype, tensor.dims, optional=tensor.optional)


def _parameters(given: dict[str, _Parameter], present: dict[str, Scalar]) -> dict[str, Scalar]:
    # Triton knows strings only. A number that comes back as it was told stays a number.
    return {
        key: present[key]
        if key in present and str(present[key]) == value.string_value
        else value.string_value
        for key, value in given.items()
    }


class _Body(msgspec.Struct, frozen=True):
    parameters: dict[str, msgspec.Raw] = {}


_bodies: Final = msgspec.json.Decoder(_Body)
_configs: Final = msgspec.json.Decoder(TritonConfig, strict=False)
"""Not strict: protobuf's JSON writes 64-bit numbers as strings."""


def decode_load(body: bytes) -> Loading:
    """What the body of a `load` says; empty is nothing. Raises `InvalidRequest`."""
    if not body.strip():
        return Loading()
    if body.count(b'"') > _MOST_QUOTES:
        raise InvalidRequest("the request has too many parameters, or too large a 'config'")
    try:
        parameters = _bodies.decode(body).parameters
        config, files = None, []
        for key, raw in parameters.items():
            if key == "config":
                if len(memoryview(raw)) > _CONFIG_BYTES:
                    raise InvalidRequest(f"the 'config' has more than {_CONFIG_BYTES} bytes")
                config = _configs.decode(msgspec.json.decode(raw, type=str))
            elif found := _FILE.match(key):
                files.append(Override(check_version(found[1]), raw))
            else:
                raise InvalidRequest(
                    f"the parameter {key[:80]!r} is not understood: 'config', or "
                    "'file:<version>/<file>'"
                )
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise InvalidRequest(f"the request is not valid: {str(error)[:300]}") from None
    if files and config is None:
        raise InvalidRequest("files need a 'config' beside them")
    versions = [file.version for file in files]
    if len(set(versions)) != len(versions):
        raise InvalidRequest("a version is one file: two are given for the same one")
    return Loading(config, tuple(sorted(files, key=lambda file: file.version)))


class _UnloadBody(msgspec.Struct, frozen=True):
    parameters: dict[str, Any] = {}


_unloads: Final = msgspec.json.Decoder(_UnloadBody)


def check_unload(body: bytes) -> None:
    """`unload_dependents` is taken and means nothing: no model depends on another here."""
    if not body.strip():
        return
    try:
        parameters = _unloads.decode(body).parameters
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the request is not valid: {str(error)[:300]}") from None
    for key, value in parameters.items():
        if key != "unload_dependents" or not isinstance(value, bool):
            raise InvalidRequest(
                f"the parameter {key[:80]!r} is not understood: 'unload_dependents', true or false"
            )
