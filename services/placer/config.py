"""The placer's settings, read once from `ROOST_PLACER_*` and the common `ROOST_*`."""

from __future__ import annotations

from services.placer.core.policy import Policy
from shared.auth import GuardedConfig
from shared.config import ConfigError
from shared.errors import InvalidRequest
from shared.keys import Key


class PlacerConfig(GuardedConfig, frozen=True, kw_only=True):
    """Callers show a key with the scope `admin`: what is told here names models and workers of all
    tenants, and what can be asked for changes the fleet."""

    host: str = "127.0.0.1"
    """Loopback: what it tells names models and workers. Images say `0.0.0.0`."""
    port: int = 8003
    """Beside the gateway's 8000. 0 takes a free one."""
    further_key: str = ""
    """One more admin key, as `<id>:<SHA-256 of its secret>`, that the registry does not have: by it
    `roost up` asks the placer that it has started."""
    instance: str = ""
    """Holder of the lease. Empty: a new random one at each start."""
    management_url: str = ""
    """RabbitMQ's management API, with user and password. When set, the limits of queues are
    laid down there as policies; empty where somebody else does that."""
    tick_s: float = 0.2
    """Reports that carry news wake the placer at once; this bounds how late anything else is."""
    lease_ttl_s: float = 3.0
    """A dead placer is succeeded within this long; models that are bound keep serving."""
    lease_renew_s: float = 0.5
    """Two renewals may be lost before the placer steps down, at half the time to live."""
    heartbeat_s: float = 1.0
    """After a start, or when the store lost its content, nothing is taken from anybody for two
    of these: workers that have not reported yet are not dead. Above the workers' interval."""
    unrouted_prefetch: int = 64
    """First requests in hand at once; a body may have 15 MiB."""
    depth_concurrency: int = 16
    """Questions to the broker at once about what waits."""
    depth_questions: int = 64
    """Queues asked about in one cycle, the most urgent first: 14 ms of it (ADR 0012)."""
    registry_check_s: float = 5.0
    """How often registrations and removals are looked for when no hint came."""
    record: str = ""
    """A file into which a trace of what is asked is written, for `roost whatif`. Empty: none."""
    record_max_bytes: int = 64 << 20
    """The trace and the one before it together. A few hundred models asked in each second write
    0.1 MB a minute: this holds some ten hours of them."""
    target_utilization: float = Policy().target_utilization
    hold_down_s: float = Policy().hold_down_s
    deactivate_after_s: float = Policy().deactivate_after_s
    victim_idle_s: float = Policy().victim_idle_s
    victim_min_age_s: float = Policy().victim_min_age_s
    retry_failed_s: float = Policy().retry_failed_s
    silent_after_s: float = Policy().silent_after_s
    shrink_after_s: float = Policy().shrink_after_s
    min_workers: int = Policy().min_workers
    scale_to_zero_after_s: float = Policy().scale_to_zero_after_s
    """These are explained in core/policy.py."""

    def __post_init__(self) -> None:
        self.own_key()
        if not 0 < self.lease_renew_s < self.lease_ttl_s / 2:
            raise ConfigError(
                "ROOST_PLACER_LEASE_RENEW_S must be above 0 and below half of "
                f"ROOST_PLACER_LEASE_TTL_S ({self.lease_ttl_s:g}): the placer steps down then"
            )
        if not 0 < self.tick_s <= 10:
            raise ConfigError("ROOST_PLACER_TICK_S must be above 0 and at most 10")
        if not 0.1 <= self.target_utilization <= 1:
            raise ConfigError("ROOST_PLACER_TARGET_UTILIZATION must be from 0.1 to 1")
        if min(self.unrouted_prefetch, self.depth_concurrency, self.depth_questions) < 1:
            raise ConfigError(
                "ROOST_PLACER_UNROUTED_PREFETCH, ..._DEPTH_CONCURRENCY and ..._DEPTH_QUESTIONS "
                "must be 1 or more"
            )
        if self.record_max_bytes < 1 << 16:
            raise ConfigError("ROOST_PLACER_RECORD_MAX_BYTES must be 65536 or more")
        if self.min_workers < 0:
            raise ConfigError("ROOST_PLACER_MIN_WORKERS must be 0 or more")

    def own_key(self) -> Key | None:
        """The further key. Raises `ConfigError`."""
        if not self.further_key:
            return None
        id_, _, digest = self.further_key.partition(":")
        try:
            return Key(id=id_, sha256=digest, scopes=("admin",), created=0.0)
        except InvalidRequest as error:
            raise ConfigError(f"ROOST_PLACER_FURTHER_KEY: {error}") from None

    def policy(self) -> Policy:
        return Policy(
            target_utilization=self.target_utilization,
            release_utilization=min(Policy().release_utilization, self.target_utilization * 0.9),
            hold_down_s=self.hold_down_s,
            deactivate_after_s=self.deactivate_after_s,
            victim_idle_s=self.victim_idle_s,
            victim_min_age_s=self.victim_min_age_s,
            retry_failed_s=self.retry_failed_s,
            # Who is looked at seldom cannot be told to be silent sooner.
            silent_after_s=max(self.silent_after_s, 3 * self.tick_s),
            shrink_after_s=self.shrink_after_s,
            min_workers=self.min_workers,
            scale_to_zero_after_s=self.scale_to_zero_after_s,
            shortest_horizon_s=self.tick_s,
        )
