"""Reads a Triton model repository as it lies there: folders, and `config.pbtxt`.

Of Triton's configuration only what means something here is known; the rest is skipped, since
a file written for another server must not fail over a knob that does not exist here. What
would change the answers (another backend, sequences, ensembles) is refused.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final, cast

import fsspec.core
import msgspec

from shared.errors import InvalidRequest, RoostError, Unavailable
from shared.models import Datatype, ModelSpec, Scalar, TensorSpec
from shared.names import check_name, check_version

CONFIG: Final = "config.pbtxt"
DEFAULT_FILENAME: Final = "model.pt"
MAX_CONFIG_BYTES: Final = 1 << 20
MAX_VERSIONS: Final = 1024
"""That a policy may name one by one."""

_DATATYPES: Final[tuple[Datatype | None, ...]] = (
    None, "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BYTES", "BF16",
)  # fmt: skip
"""Our datatypes by Triton's numbers. Triton calls BYTES `TYPE_STRING`."""

# Strings and comments are matched so that nothing is found inside them.
_BARE_LIST: Final = re.compile(
    r""""(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|\#[^\n]*|\b([A-Za-z_]\w*)\s*\["""
)


class TritonFile(msgspec.Struct, frozen=True):
    """One version that can be registered."""

    name: str
    version: int
    spec: ModelSpec
    open: Callable[[], BinaryIO]


class Found(msgspec.Struct, frozen=True):
    """One thing found in a model repository: a version, or why there is none."""

    label: str
    """`<model>` or `<model>/<version>`."""
    content: TritonFile | RoostError


def scan(directory: str) -> Iterator[Found]:
    """Every model version below `directory`, a path or fsspec URL, one error each for those
    that cannot be. Raises `InvalidRequest` when there is no such directory."""
    try:
        filesystem, root = fsspec.core.url_to_fs(directory)
        folders = _folders(filesystem, root)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidRequest("the Triton model repository is not a directory") from error
    except (ImportError, ValueError) as error:
        raise InvalidRequest(f"the Triton model repository cannot be opened: {error}") from error
    except OSError as error:
        raise Unavailable(
            f"the Triton model repository cannot be read: {error.strerror or error}"
        ) from error
    for name, path in folders:
        if name.startswith("."):
            continue  # e.g. .git
        try:
            yield from _scan_model(filesystem, name, path)
        except RoostError as error:
            yield Found(name, error)
        except OSError as error:
            yield Found(name, Unavailable(f"cannot be read: {error.strerror or error}"))


def _scan_model(filesystem: Any, name: str, path: str) -> Iterator[Found]:
    check_name(name)
    spec, filename, config = ModelSpec(), DEFAULT_FILENAME, None
    if filesystem.exists(f"{path}/{CONFIG}"):
        with filesystem.open(f"{path}/{CONFIG}", "rb") as file:
            config = config_of(file.read(MAX_CONFIG_BYTES + 1))
        spec = spec_from_config(config, name)
        filename = config["default_model_filename"] or DEFAULT_FILENAME
        if "/" in filename or filename in {".", ".."}:
            raise InvalidRequest(f"default_model_filename {filename!r} is a path")
    present: dict[int, str] = {}
    for folder, where in _folders(filesystem, path):
        try:
            present[check_version(folder)] = where
        except InvalidRequest:
            continue  # Triton too passes by what is no number, or begins with 0
    if not present:
        raise InvalidRequest("has no version folder: a number, with the model file in it")
    for version in chosen_versions(config, sorted(present)):
        label = f"{name}/{version}"
        if version not in present:
            yield Found(label, InvalidRequest("version_policy names it, but it is not there"))
        elif not filesystem.isfile(file_path := f"{present[version]}/{filename}"):
            yield Found(label, InvalidRequest(f"has no file {filename}"))
        else:
            opener = functools.partial(filesystem.open, file_path, "rb")
            yield Found(label, TritonFile(name, version, spec, opener))


def _folders(filesystem: Any, path: str) -> list[tuple[str, str]]:
    """Name and path of each folder, sorted. A file in the place of a folder has none."""
    listed = filesystem.ls(path, detail=True)
    folders = [
        (entry["name"].rstrip("/").rpartition("/")[2], entry["name"].rstrip("/"))
        for entry in listed
        if entry["type"] == "directory"
        # fsspec calls a link to a folder a "link" or "other".
        or (entry["type"] in {"link", "other"} and filesystem.isdir(entry["name"]))
    ]
    if not folders and listed and filesystem.isfile(path):
        raise NotADirectoryError(path)
    return sorted(folders)


def config_of(raw: bytes) -> dict[str, Any]:
    """As `read_config`, of a file's content."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise InvalidRequest(f"{CONFIG} is larger than {MAX_CONFIG_BYTES:,} bytes")
    try:
        return read_config(raw.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{CONFIG} is not text: {error}") from error


def read_config(text: str) -> dict[str, Any]:
    """The known fields of a `config.pbtxt`, by their names; those not set have protobuf's
    defaults, messages not set are None. Raises `InvalidRequest` when it cannot be parsed, or
    when protobuf is not installed."""
    try:
        from google.protobuf import text_format
    except ImportError as error:
        raise InvalidRequest(
            f"reading {CONFIG} needs protobuf: install the extra 'triton' (roost[triton])"
        ) from error
    try:
        with warnings.catch_warnings():
            # protobuf decodes strings with Python's own escapes, which warns of unknown ones.
            warnings.simplefilter("ignore", DeprecationWarning)
            parsed = text_format.Parse(
                with_colons(text), _config_class()(), allow_unknown_field=True
            )
    except (text_format.ParseError, RecursionError, UnicodeError, ValueError) as error:
        raise InvalidRequest(f"{CONFIG} cannot be read: {error}") from error
    return cast("dict[str, Any]", _plain(parsed))


def with_colons(text: str) -> str:
    """`instance_group [ {…} ]` as `instance_group: [ {…} ]`: the same, but protobuf's parser
    passes by an unknown list only when it has the colon that Triton's users leave out."""
    return _BARE_LIST.sub(lambda found: f"{found[1]}: [" if found[1] else found[0], text)


def spec_from_config(config: dict[str, Any], name: str) -> ModelSpec:
    """What the configuration says of the model in the folder `name`; `InvalidRequest` when it
    is not one for us."""
    if config["name"] not in {"", name}:
        raise InvalidRequest(f"{CONFIG} is of model {config['name'][:128]!r}, not of {name!r}")
    backend, platform = config["backend"], config["platform"]
    if backend not in {"", "pytorch"} or platform not in {"", "pytorch_libtorch"}:
        kind = (
            f"backend {backend!r}" if backend not in {"", "pytorch"} else f"platform {platform!r}"
        )
        raise InvalidRequest(
            f"has the {kind[:80]}; only TorchScript models can be imported "
            "(backend 'pytorch', platform 'pytorch_libtorch')"
        )
    if config["sequence_batching"] is not None:
        raise InvalidRequest("uses sequence_batching, which is not supported")
    batching = config["dynamic_batching"] or {}
    parameters: dict[str, Scalar] = {
        key: value["string_value"] for key, value in config["parameters"].items()
    }
    return ModelSpec(
        inputs=_tensors("input", config["input"]),
        outputs=_tensors("output", config["output"]),
        max_batch_size=config["max_batch_size"],
        max_queue_delay_us=batching.get("max_queue_delay_microseconds", 0),
        preferred_batch_size=tuple(sorted(set(batching.get("preferred_batch_size", ())))),
        # Without levels Triton knows no priorities, whatever it calls the default one.
        default_priority_level=(
            batching.get("default_priority_level", 0) if batching.get("priority_levels") else 0
        ),
        parameters=parameters,
    )


def chosen_versions(config: dict[str, Any] | None, present: list[int]) -> list[int]:
    """The versions to import, ascending, of those `present` (ascending).

    Without a policy Triton serves the newest alone; here all are imported, since a version
    that nobody asks for costs nothing, and the newest is what the bare name means anyway.
    """
    policy = (config or {}).get("version_policy") or {}
    if policy.get("specific") is not None:
        wanted = policy["specific"]["versions"]
        if len(wanted) > MAX_VERSIONS:
            raise InvalidRequest(f"version_policy names more than {MAX_VERSIONS} versions")
        return sorted({check_version(number) for number in wanted})
    if policy.get("latest") is not None:
        return present[-max(1, policy["latest"]["num_versions"]) :]
    return present


def _tensors(kind: str, declared: list[dict[str, Any]]) -> tuple[TensorSpec, ...] | None:
    specs = []
    for tensor in declared:
        number = tensor["data_type"]
        datatype = _DATATYPES[number] if 0 <= number < len(_DATATYPES) else None
        if datatype is None:
            raise InvalidRequest(f"{kind} {tensor['name'][:128]!r} has no valid data_type")
        specs.append(
            TensorSpec(
                tensor["name"],
                datatype,
                tuple(tensor["dims"]),
                optional=tensor.get("optional", False),
            )
        )
    return tuple(specs) or None


def _plain(message: Any) -> Any:
    """A protobuf message as dicts and lists."""
    plain: dict[str, Any] = {}
    kinds = _MESSAGES[message.DESCRIPTOR.name]
    for field in message.DESCRIPTOR.fields:
        repeated = kinds[field.name].startswith("*")
        value = getattr(message, field.name)
        if field.message_type is None:
            plain[field.name] = list(value) if repeated else value
        elif field.message_type.GetOptions().map_entry:
            plain[field.name] = {key: _plain(value[key]) for key in value}
        elif repeated:
            plain[field.name] = [_plain(item) for item in value]
        else:
            plain[field.name] = _plain(value) if message.HasField(field.name) else None
    return plain


_MESSAGES: Final[dict[str, dict[str, str]]] = {
    "ModelConfig": {
        "name": "string", "platform": "string", "backend": "string", "max_batch_size": "int32",
        "default_model_filename": "string", "input": "*ModelInput", "output": "*ModelOutput",
        "version_policy": "VersionPolicy", "dynamic_batching": "DynamicBatching",
        "sequence_batching": "Ignored", "parameters": "*ParametersEntry",
    },
    "ModelInput": {"name": "string", "data_type": "enum", "dims": "*int64", "optional": "bool"},
    "ModelOutput": {"name": "string", "data_type": "enum", "dims": "*int64"},
    "VersionPolicy": {"latest": "Latest", "all": "Ignored", "specific": "Specific"},
    "Latest": {"num_versions": "uint32"},
    "Specific": {"versions": "*int64"},
    "DynamicBatching": {
        "preferred_batch_size": "*int32", "max_queue_delay_microseconds": "uint64",
        "priority_levels": "uint64", "default_priority_level": "uint64",
    },
    "ParametersEntry": {"key": "string", "value": "Parameter"},
    "Parameter": {"string_value": "string"},
    "Ignored": {},
}  # fmt: skip
"""Our part of Triton's configuration: field types by message, `*` for repeated. The text
format knows fields by name, so the numbers are free."""


@functools.cache
def _config_class() -> Any:
    """Built here rather than generated: no compiler, and no clash with the full description
    that a Triton client in the same process registers."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="roost/triton.proto", package="roost.triton", syntax="proto3"
    )
    kinds = file.enum_type.add(name="DataType")
    for number, datatype in enumerate(_DATATYPES):
        triton = {None: "INVALID", "BYTES": "STRING"}.get(datatype, datatype)
        kinds.value.add(name=f"TYPE_{triton}", number=number)
    field_proto = descriptor_pb2.FieldDescriptorProto
    root = file.message_type.add(name="ModelConfig")
    for message, fields in _MESSAGES.items():
        at_root = message == "ModelConfig"
        proto = root if at_root else root.nested_type.add(name=message)
        if message == "ParametersEntry":
            proto.options.map_entry = True
        for number, (name, declared) in enumerate(fields.items(), start=1):
            kind = declared.removeprefix("*")
            field = proto.field.add(name=name, number=number)
            repeated = declared.startswith("*")
            field.label = field_proto.LABEL_REPEATED if repeated else field_proto.LABEL_OPTIONAL
            if kind == "enum":
                field.type, field.type_name = field_proto.TYPE_ENUM, ".roost.triton.DataType"
            elif kind in _MESSAGES:
                field.type = field_proto.TYPE_MESSAGE
                field.type_name = f".roost.triton.ModelConfig.{kind}"
            else:
                field.type = getattr(field_proto, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName("roost.triton.ModelConfig")
    return message_factory.GetMessageClass(found)
