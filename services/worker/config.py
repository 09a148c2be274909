"""A worker's settings, read once from `ROOST_WORKER_*` and the common `ROOST_*`."""

from __future__ import annotations

import re
import socket
import uuid

from services.worker.confinement import plan
from shared.auth import GuardedConfig
from shared.config import ConfigError
from shared.units import parse_bytes

_DEVICE = re.compile(r"(auto|cpu|cuda(:[0-9]{1,3})?)\Z")
_WORKER = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}\Z")
_VALUE = re.compile(r"[A-Za-z0-9._:-]{0,128}\Z")
_OWN_LABELS = ("worker", "host", "device_kind")


class WorkerConfig(GuardedConfig, frozen=True, kw_only=True):
    """Its callers are those who read metrics, which name the models of all tenants."""

    worker_id: str = ""
    """Names the worker in reports and assignments, and must differ between workers. Empty: the
    host's name and something random, new at each start."""
    labels: str = ""
    """What models' `placement` may ask for, as `zone=a,gpu=t4`; `worker`, `host` and
    `device_kind` are there by themselves."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:<n>`; `auto` takes the first GPU where there is one, else the CPU."""
    budget_bytes: int | str = 0
    """What all models together may take of the device: bytes, or as `4GiB`. 0: what the device
    has, less the headroom. On a CPU the engine's own memory is not counted."""
    headroom_bytes: int | str = "1GiB"
    """Left alone when the budget follows from the device: for the context, for fragments of
    the allocator, and for whoever else is there."""
    host_bytes: int | str = "auto"
    """What copies of weights may take of the host's memory, from where a model is swapped in: so
    much may be assigned beyond the device's budget. `auto`: on a GPU its share, with one worker
    on each GPU that the machine (or container) has, of half of the memory that is free, at most
    eight times the budget; on a CPU 0, since there the system's page cache is that tier already.
    To be set where several containers, or several workers on one GPU, share the memory."""
    share_tensors: bool = True
    """Tensors that several models have in common are kept once in each tier. Models that write to
    their weights never share."""
    threads: int = 1
    """CPU threads of one operator in the engine. Several workers share a machine's cores better
    with one each."""
    confine: plan.Mode = "auto"
    """What keeps the engine, which runs models' programs, from everything else: `auto` takes all
    that the host grants and says what it lacks, `require` does not start without the essential
    measures (docs/security.md), `off` takes none, for debugging."""
    engine_user: str = ""
    """`NAME`, `UID` or `UID:GID` that the engine becomes, where the worker is started as root. That
    user must be able to read Python, torch and the models' files. Empty: the worker's own."""
    engine_reads: str = ""
    """Folders besides, with colons between, that a confined engine may read: of libraries that are
    neither the system's nor Python's own."""
    inbox_bytes: int | str = "128MiB"
    """Shared memory for inputs on their way to the engine: eight messages of the greatest size.
    Pages are taken when first used."""
    outbox_bytes: int | str = "128MiB"
    """The same for outputs."""
    max_held_bytes: int | str = "512MiB"
    """Request bodies in memory at once; beyond it the models that hold most stop consuming."""
    report_interval_s: float = 0.25
    """As often as the placer's tick; news travels at once in any case."""
    report_ttl_s: float = 3.0
    """A worker that is silent for so long counts as gone: a dozen reports may be lost."""
    drain_grace_s: float = 30.0
    """How long SIGTERM waits for batches under way; what is held then goes back to its queue."""
    batch_timeout_s: float = 60.0
    """A batch that runs longer, and twenty times longer than was measured, costs the engine its
    life: no request waits so long. What hung is then tried alone, and buried if it hangs again."""
    load_timeout_s: float = 300.0
    """The same for a load: tens of gigabytes from a slow disk, and the warm-up."""
    publish_timeout_s: float = 5.0
    """For the broker to confirm a reply; afterwards it is sent again."""
    cache_dir: str = ""
    """Copies of files of a repository that is not a directory. Empty: below `data_dir`."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    """Where Prometheus scrapes; 0 is off, since several workers share a machine."""

    def __post_init__(self) -> None:
        for name in (
            "budget_bytes", "headroom_bytes", "inbox_bytes", "outbox_bytes", "max_held_bytes",
        ):  # fmt: skip
            try:
                parse_bytes(getattr(self, name))
            except ValueError as error:
                raise ConfigError(f"ROOST_WORKER_{name.upper()}: {error}") from None
        if self.host_bytes != "auto":
            try:
                parse_bytes(self.host_bytes)
            except ValueError as error:
                raise ConfigError(f"ROOST_WORKER_HOST_BYTES: {error}, or auto") from None
        if not _DEVICE.match(self.device):
            raise ConfigError(
                f"ROOST_WORKER_DEVICE={self.device!r}: auto, cpu, cuda or cuda:<n> is expected"
            )
        if self.worker_id and not _WORKER.match(self.worker_id):
            raise ConfigError(
                f"ROOST_WORKER_WORKER_ID={self.worker_id!r}: 1 to 64 of A-Z a-z 0-9 . _ -"
            )
        if parse_bytes(self.inbox_bytes) < 32 << 20 or parse_bytes(self.outbox_bytes) < 32 << 20:
            raise ConfigError("ROOST_WORKER_INBOX_BYTES and _OUTBOX_BYTES: 32MiB at least")
        if self.batch_timeout_s <= 0 or self.load_timeout_s <= 0:
            raise ConfigError("ROOST_WORKER_BATCH_TIMEOUT_S and _LOAD_TIMEOUT_S: above 0")
        if not 0 < self.report_interval_s < self.report_ttl_s:
            raise ConfigError("ROOST_WORKER_REPORT_INTERVAL_S must be below ..._REPORT_TTL_S")

        parse_labels(self.labels)

    @property
    def cache(self) -> str:
        return self.cache_dir or f"{self.data_dir}/cache"

    def new_worker_id(self) -> str:
        """The configured id, or a fresh one."""
        if self.worker_id:
            return self.worker_id
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:50]
        return f"{host or 'worker'}-{uuid.uuid4().hex[:8]}"


def parse_labels(text: str) -> dict[str, str]:
    """`a=b,c=d` as a dict. Raises `ConfigError`."""
    labels: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not _LABEL.match(name) or not _VALUE.match(value):
            raise ConfigError(
                f"ROOST_WORKER_LABELS: {part!r} is not NAME=VALUE (of A-Z a-z 0-9 . _ - and, in "
                "names / or, in values :)"
            )
        if name in _OWN_LABELS or name in labels:
            whose = "the worker's own" if name in _OWN_LABELS else "given twice"
            raise ConfigError(f"ROOST_WORKER_LABELS: the label {name!r} is {whose}")
        labels[name] = value
    return labels
