"""AOTInductor packages: native code, compiled ahead of time for one kind of machine.

Loading one runs it, and nothing holds it back but this process' confinement.
What can be checked is checked before: that it was compiled for this device and processor, that
its weights are there, and with each batch that the inputs are of the shapes and datatypes that
it was compiled for. Otherwise it would read and write beyond their ends.
"""

from __future__ import annotations

import io
import os
import platform
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import msgspec
import torch
from torch.utils import _pytree as pytree

from services.worker.engine.failures import Failed, essence
from services.worker.engine.files import ScatteredFile
from services.worker.engine.libraries import drop_pages, has_text, unpack
from services.worker.engine.limits import Binder, Limits, Span, check_batching, declared
from services.worker.engine.signature import Argument, merge
from services.worker.engine.tensors import Value
from shared import pt2
from shared.errors import InvalidRequest
from shared.models import Manifest, TensorSpec
from shared.tensors import shown

_CHECK: Final = "AOTI_RUNTIME_CHECK_INPUTS"
"""With it the compiled code checks what it is called with. Each library asks for it once."""
os.environ[_CHECK] = "1"

_ROWS: Final = re.compile(
    rb"input_handles\[(\d{1,4})\]: dim value is too (small|large) at 0, [\s\"<]*"
    rb"expected (?:it )?to be [<>]= (\d{1,18}), "
)
"""In the code's source: what it refuses as a first dimension."""
_MAX_SOURCE_BYTES: Final = 64 << 20
_LEAST_DYNAMIC: Final = 2
"""What inductor takes a dynamic dimension to be at least, unless told otherwise."""
_PROCESSORS: Final = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512_VNNI": "_is_vnni_supported",
    "AVX512_BF16": "_is_avx512_bf16_supported",
    "AMX_TILE": "_is_amx_tile_supported",
    "AMX_FP16": "_is_amx_fp16_supported",
}
"""Names of instruction sets in a package, and what torch says of this processor. Of others
nothing is known."""


def estimate(file: ScatteredFile) -> int:
    """Bytes of the package's weights and code, told without loading it. Raises `Failed`."""
    package = _described(file)
    return package.library_bytes + package.weights_bytes


class AotInductorExecutor:
    """One package on one device. Runs on one thread at a time."""

    def __init__(self, file: ScatteredFile, manifest: Manifest, device: torch.device) -> None:
        """Raises `Failed` (`model_failed`) for a package that is not complete, or not for this
        machine, and whatever torch raises."""
        package = _described(file)
        check_target(package.notes, device)
        with file.open() as raw, zipfile.ZipFile(cast("BinaryIO", raw)) as archive:
            library = unpack(archive, package.root, package.files) / package.library
            self._rows = _rows(archive, package)
            if manifest.inputs is None and not has_text(library, _CHECK.encode()):
                raise Failed(
                    "model_failed",
                    "the package was compiled without checks of its inputs, so the manifest must "
                    "say what they are",
                )
            self._runner = _runner(library, device)
            self._weights = _weights(archive, package, device)
        self._device = device
        self._install()
        self._code_bytes = package.library_bytes if device.type == "cpu" else 0
        if not package.weights and device.type == "cpu":  # weights in the library are not code
            self._code_bytes = max(self._code_bytes - sum(self._storages.values()), 0)
        drop_pages(library)
        takes, gives = self._runner.get_call_spec()
        self.schema = _arguments(takes, manifest.inputs)
        self._results = pytree.treespec_loads(gives)
        self._binder = Binder(self.schema, manifest.inputs)
        self._limits = self._declared(manifest)
        self._batches = manifest.max_batch_size > 0
        asked = [argument.name for argument in self.schema if argument.kind == "tensor"]
        for name, span in zip(asked, map(self._rows.get, range(len(asked))), strict=True):
            if span is not None:  # one row is run as two: see `_widened`
                rows = span._replace(least=1) if span.least == _LEAST_DYNAMIC else span
                check_batching(name, (rows,), manifest.max_batch_size)

    def run(self, inputs: Sequence[tuple[str, Value]]) -> object:
        plan = self._binder.plan(inputs)
        tensors: list[torch.Tensor] = []
        for argument, limits, at in zip(self.schema, self._limits, plan, strict=True):
            if at is None:
                continue
            value = inputs[at][1]
            if limits is not None:
                limits.check(argument.name, value)
            if isinstance(value, list):
                raise Failed("invalid_argument", f"input {shown(argument.name)} takes no BYTES")
            tensors.append(value.to(self._device, non_blocking=True).contiguous())
        widened = self._widened(tensors)
        try:
            results = self._runner.run(widened or tensors)
        except RuntimeError as error:
            why = str(error)
            if why.startswith("input_handles["):
                raise Failed(
                    "invalid_argument", f"the inputs do not suit the program: {essence(why)}"
                ) from None
            raise
        if widened:
            results = [each[:1] if each.shape[:1] == (2,) else each for each in results]
        return pytree.tree_unflatten(results, self._results)

    def _widened(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """A batch of one row as two equal ones, where the code was compiled for two or more."""
        if not self._batches or not any(
            span.least == _LEAST_DYNAMIC for span in self._rows.values()
        ):
            return None
        if any(tensor.shape[:1] != (1,) for tensor in tensors):
            return None
        return [tensor.expand(2, *tensor.shape[1:]).contiguous() for tensor in tensors]

    def weights_bytes(self, granule: int) -> int:
        """The constants where they are, and on a CPU the code as well."""
        sizes = [*self._storages.values(), self._code_bytes]
        return sum(-(-nbytes // granule) * granule for nbytes in sizes)

    def close(self) -> None:
        del self._runner
        # torch keeps a reference to each weight that it was handed (2.13): leave it an empty one.
        for tensor in self._weights.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        del self._weights

    def _install(self) -> None:
        """Hands the weights over, without a copy, and counts them. A package without its weights
        loads all the same, and its first run would end this process."""
        names = self._runner.get_constant_names_to_original_fqns()
        if self._weights:
            lacking = sorted(set(names.values()) - self._weights.keys())
            if lacking:
                raise Failed("model_failed", f"the package lacks the weight {shown(lacking[0])}")
            weights = {name: self._weights[full] for name, full in names.items()}
            self._runner.update_constant_buffer(weights, False, True, True)
        held = self._runner.extract_constants_map(False)
        if names and not held:
            raise Failed(
                "model_failed",
                "the package has no weights: package them in the library, or with "
                "package_constants_on_disk_format='pickle_weights'",
            )
        storages = (tensor.untyped_storage() for tensor in held.values())
        self._storages = {each.data_ptr(): each.nbytes() for each in storages}

    def _declared(self, manifest: Manifest) -> tuple[Limits | None, ...]:
        """What the manifest says that each argument takes."""
        if manifest.inputs is None:
            return (None,) * len(self.schema)
        merge(self.schema, manifest.inputs)  # raises for names that the package does not have
        plan = self._binder.plan([(spec.name, []) for spec in manifest.inputs])
        return tuple(
            None if at is None else declared(manifest.inputs[at], manifest.max_batch_size)
            for at in plan
        )


def check_target(notes: dict[str, str], device: torch.device) -> None:
    """Raises `Failed` (`model_failed`) when a package was compiled for another machine."""
    here = {
        "AOTI_DEVICE_KEY": device.type,
        "AOTI_PLATFORM": sys.platform,
        "AOTI_MACHINE": platform.machine(),
    }
    for key, value in here.items():
        if notes.get(key, value) != value:
            raise Failed(
                "model_failed",
                f"the package was compiled for {notes[key]}, this worker is {value}: "
                "compile it on the machine that is to run it",
            )
    if device.type == "cpu":
        for name in notes.get("AOTI_CPU_ISA", "").split():
            supported = getattr(torch.cpu, _PROCESSORS.get(name.upper(), ""), None)
            if supported is not None and not supported():
                raise Failed(
                    "model_failed",
                    f"the package was compiled for processors with {name}, this one has none",
                )
    elif device.type == "cuda":
        needs = notes.get("AOTI_COMPUTE_CAPABILITY", "")
        major, minor = torch.cuda.get_device_capability(device)
        if needs.isdigit() and int(needs) > major * 10 + minor:
            raise Failed(
                "model_failed",
                f"the package was compiled for compute capability {needs}, this device has "
                f"{major}{minor}",
            )


def _described(file: ScatteredFile) -> pt2.Package:
    with file.open() as raw:
        try:
            return pt2.read_package(cast("BinaryIO", raw))
        except InvalidRequest as error:
            raise Failed("model_failed", str(error)) from None


def _rows(archive: zipfile.ZipFile, package: pt2.Package) -> dict[int, Span]:
    """How many rows each input may have, as far as the source tells: the code itself only
    refuses the others."""
    if package.source is None:
        return {}
    with archive.open(f"{package.root}/{package.source}") as file:
        source = file.read(_MAX_SOURCE_BYTES)
    spans: dict[int, Span] = {}
    for found in _ROWS.finditer(source):
        index, bound = int(found[1]), int(found[3])
        span = spans.get(index, Span())
        most = found[2] == b"large"
        spans[index] = span._replace(most=bound) if most else span._replace(least=bound)
    return spans


def _runner(library: Path, device: torch.device) -> Any:
    """Not the loader of packages that torch has, which unpacks the file anew for each load, and
    leaves that behind."""
    aoti = cast("Any", torch._C)._aoti  # noqa: SLF001 — there is no public name for it
    if device.type == "cuda":
        return aoti.AOTIModelContainerRunnerCuda(
            str(library), 1, f"cuda:{device.index or 0}", str(library.parent)
        )
    return aoti.AOTIModelContainerRunnerCpu(str(library), 1)


def _weights(
    archive: zipfile.ZipFile, package: pt2.Package, device: torch.device
) -> dict[str, torch.Tensor]:
    """Those that lie beside the library, on the device, by full name."""
    loaded: dict[str, torch.Tensor] = {}
    weights = {}
    for name, weight in package.weights.items():
        if weight.member not in loaded:
            data = io.BytesIO(archive.read(f"{package.root}/{weight.member}"))
            tensor = torch.load(data, map_location=device, weights_only=True)
            if not isinstance(tensor, torch.Tensor):
                raise Failed("model_failed", f"weight {shown(name)} is no tensor")
            loaded[weight.member] = tensor.detach()
        weights[name] = loaded[weight.member].as_strided(weight.shape, weight.stride, weight.start)
    return weights


def _arguments(spec: str, listed: Sequence[TensorSpec] | None) -> tuple[Argument, ...]:
    """The package's inputs in order. It has no names for those that are given by place, so they
    count: `INPUT__0`, …; the manifest's names follow the same order. What the manifest does not
    list was None or a number when the package was compiled, and is not asked for."""
    try:
        places, by_name = msgspec.json.decode(spec, type=tuple[int, _Tree])[1].children_spec
    except (msgspec.MsgspecError, ValueError) as error:
        raise Failed("model_failed", f"the package's inputs cannot be told: {error}") from None
    keywords = [str(key) for key in msgspec.json.decode(by_name.context or "[]")]
    for each in (*places.children_spec, *by_name.children_spec):
        if each.children_spec:
            raise Failed(
                "model_failed",
                f"the package takes a nested input ({each.type}), which no request can carry: "
                "compile a wrapper that takes tensors one by one",
            )
    names = [f"INPUT__{index}" for index in range(len(places.children_spec))]
    known = None if listed is None else {each.name for each in listed}
    by_place = len(names) if known is None else len(known - set(keywords))
    return (
        *(_argument(name, asked=index < by_place) for index, name in enumerate(names)),
        *(_argument(name, asked=known is None or name in known) for name in keywords),
    )


def _argument(name: str, *, asked: bool) -> Argument:
    return Argument(name, "tensor") if asked else Argument(name, "other", optional=True)


class _Tree(msgspec.Struct):
    """torch's description of nested arguments."""

    type: str | None = None
    context: str | None = None
    children_spec: list[_Tree] = []
