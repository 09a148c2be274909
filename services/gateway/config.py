"""The gateway's settings, read once from `ROOST_GATEWAY_*` and the common `ROOST_*`."""

from __future__ import annotations

import re

from shared.auth import GuardedConfig
from shared.config import ConfigError
from shared.names import REPLY_QUEUE_PREFIX

_INSTANCE = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


class GatewayConfig(GuardedConfig, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    """Loopback: who wants the network to reach the gateway says so (images do)."""
    port: int = 8000
    """Triton's HTTP port, where its clients look. 0 takes a free one."""
    grpc_port: int = 8001
    """Triton's gRPC port; 0 takes a free one, -1 none: then there is no gRPC, as there is none
    where grpcio is not installed."""
    instance: str = ""
    """Names the reply queue, and must differ between gateways. Empty: a new random one at each
    start; a fixed one (a StatefulSet's pod name) keeps one queue across restarts."""
    request_limit_bytes: int = 15 * 1024 * 1024
    """RabbitMQ 4 takes messages of 16 MiB; the rest is for headers and to be safe. Counted
    after decompression."""
    load_limit_bytes: int = 64 * 1024 * 1024
    """Body of a `load` that brings its files along, in base64. Triton's own limit of a request
    over HTTP; larger files are uploaded."""
    upload_limit_bytes: int = 16 * 1024**3
    """No model of the kind that shares a device is larger."""
    upload_limit: int = 8
    """Uploads at once: each has a file open and a thread now and then."""
    default_timeout_s: float = 30.0
    """Long enough for a cold start; half of what clients wait (60 s in tritonclient)."""
    max_timeout_s: float = 300.0
    """What a request may ask for. Beyond it a queue hides that nobody is there."""
    model_inflight_limit: int = 1024
    """Requests of one model between admission and answer: some seconds of work of a fast
    model, and one model's flood leaves room for the others."""
    tenant_header: str = ""
    """Header that names who asks, e.g. `x-tenant`. Where no API keys are asked for, whatever
    authenticates requests in front of the gateway must set it, since nothing here does. Where they
    are, the key says who asks, and this header counts only with a key of nobody in particular."""
    tenant_inflight_limit: int = 256
    """Requests of one tenant between admission and answer, where its quota says nothing: a quarter
    of one model's, so that no tenant alone keeps others from a model."""
    inflight_bytes_limit: int = 256 * 1024 * 1024
    """Request bodies held in memory, of all models together."""
    body_timeout_s: float = 30.0
    """From the headers to the last byte of a request; for an upload, between two reads."""
    publish_timeout_s: float = 5.0
    """How long the broker may take to confirm. Afterwards the answer is still awaited."""
    packing: bool = True
    """Requests of one model that wait together travel in one message. Off while there are workers
    of a version that does not read packs."""
    reply_expires_s: float = 300.0
    """The broker deletes the reply queue when no gateway has used it for so long."""
    reply_prefetch: int = 512
    """Replies on the way at once. They are acknowledged on receipt; this only bounds memory."""

    job_timeout_s: float = 24 * 3600.0
    """Deadline of a job that names none: it may wait out a night without a device."""
    job_max_timeout_s: float = 7 * 24 * 3600.0
    """What a job may ask for."""
    job_keep_s: float = 24 * 3600.0
    """How long the result of a job is kept, from the job's end."""
    job_prefetch: int = 32
    """Jobs of one model (in truth: of an eighth of the models) under way at once, by this
    gateway: enough to fill batches, and as many may stand before a request that somebody waits
    for. 0: this gateway accepts jobs and leaves running them to others."""

    stop_delay_s: float = 0.5
    """After SIGTERM new requests are still taken for so long, while readiness is false and each
    answer closes its connection: whoever chooses among gateways goes elsewhere before this one
    closes its port. Above the time in which your load balancer hears of it (on Kubernetes
    seconds), and with `stop_grace_s` and 2 s more below the time after which you kill."""
    stop_grace_s: float = 6.0
    """How long requests under way may still be answered after that; the rest gets 503.
    Container engines kill after 10 s."""

    @property
    def reply_queue_instance(self) -> str:
        """The configured instance, checked; empty when there is none."""
        if self.instance and not _INSTANCE.match(self.instance):
            raise ConfigError(
                f"ROOST_GATEWAY_INSTANCE={self.instance!r}: 1 to 64 of A-Z a-z 0-9 . _ - "
                f"are expected (it becomes part of the queue {REPLY_QUEUE_PREFIX}…)"
            )
        return self.instance
