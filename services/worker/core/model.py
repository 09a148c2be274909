"""One model as its worker knows it: where its weights are, what it takes, what became of it.

On the device: absent → fetching → absent, with a manifest → loading → ready → evicting → absent.
In the host's memory: none → coming → held → going → none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from services.worker.core.events import (
    Action,
    DeathsFound,
    KeepDeath,
    ModelFetched,
    ModelLoaded,
    TellPlacer,
)
from services.worker.core.profile import Measured
from shared.control import ModelReport, Phase, Tier
from shared.models import Footprint, Manifest
from shared.names import ModelId

Stage = Literal["absent", "fetching", "loading", "ready", "evicting"]
"""`loading`: the engine was asked to bring it into `target`; all else is about the device."""
Copy = Literal["none", "coming", "held", "going"]
"""Of its weights, in the host's memory."""
MAX_DEATHS = 2
"""Engines that one load, or one item, may kill before it is kept from them."""
MAX_BURIED = 2
"""Buried items of one model before it is kept from engines itself. One may be the request's own
fault; at two it is the model's, and each has cost all its neighbours two reloads."""
_FARNESS = 10.0
"""Of the disk, until it is measured: a guess, since a copy that is needed again costs much less."""
_RETRY_S = 2.0
_RETRY_CAP_S = 300.0


@dataclass(slots=True)
class Model:
    """Its counters only grow, until it is forgotten."""

    id: ModelId
    stage: Stage = "absent"
    target: Literal["host", "device"] = "device"
    copy: Copy = "none"
    manifest: Manifest | None = None
    digest: str = ""
    """Of the file that everything below was seen of; it outlasts the manifest."""
    measured: Measured = field(default_factory=lambda: Measured(0, None))
    architecture: str = ""
    as_copy: Footprint | None = None
    """What a copy takes of the host's memory; None when there can be none."""
    admitted: bool = False
    """It is wanted, and there is room for it in the tiers together."""
    served: bool = False
    """It was admitted and brought in: it is consumed, wherever its weights are now."""
    eager: bool = False
    """It comes onto the device as soon as there is room, asked or not: newly wanted."""
    ran: bool = False
    """It had a batch since it came onto the device."""
    error: str | None = None
    refused_at: int = -1
    """What was admitted (its version) when there was no room for it."""
    failures: int = 0
    retry_at: float = 0.0
    load_began: float = 0.0
    load_deaths: int = 0
    buried: int = 0
    """Items that were buried, having killed engines."""
    unkept: int = 0
    """Deaths that are not yet written down for the other workers."""
    kept: bool = False
    """Some are: it is for all workers together to say whether it is kept from engines."""
    kept_away: str | None = None
    """Why it is, as they said when it was fetched."""
    suspect: bool = False
    """An engine died while it was loading: it loads with nothing beside it."""
    consumers: int = 0
    unanswered: int = 0
    held: int = 0
    arrived: int = 0
    answered: int = 0
    busy_s: float = 0.0
    last_used: float = 0.0

    @property
    def footprint(self) -> Footprint:
        """On the device."""
        measured = self.measured.footprint
        if self.manifest is None or self.copyable:
            return measured
        return msgspec.structs.replace(measured, pinned=self.pinned, copyable=False)

    @property
    def tenant(self) -> str:
        """Whose it is (`Manifest.tenant`); nobody's as long as it was not fetched."""
        return "" if self.manifest is None else self.manifest.tenant

    @property
    def copyable(self) -> bool:
        """A copy of it can be in the host's memory."""
        return self.as_copy is not None

    @property
    def pinned(self) -> bool:
        """It never leaves the device while it is wanted: its state would be gone."""
        return self.manifest is not None and self.manifest.stateful

    @property
    def on_device(self) -> bool:
        """It counts against the device's budget. What is being evicted does not: the engine does
        that before whatever it is told later."""
        return self.stage == "ready" or (self.stage == "loading" and self.target == "device")

    @property
    def in_host(self) -> bool:
        """The same for the host's."""
        return self.copy in {"coming", "held"}

    @property
    def known_to_engine(self) -> bool:
        return self.stage in {"loading", "ready", "evicting"} or self.copy != "none"

    @property
    def is_due(self) -> bool:
        """If it is wanted, it is not where it should be, and is not on its way."""
        return (
            self.stage == "absent"
            # What is quarantined is fetched, once per assignment: the file may be another one.
            and (self.manifest is None or not self.quarantined)
            and (self.eager or not self.served or (self.copyable and self.copy == "none"))
        )

    @property
    def forgettable(self) -> bool:
        """If it is not wanted, nothing hangs on it any more."""
        return (
            self.stage == "absent"
            and self.copy == "none"
            and not self.consumers
            and not self.held
            and not (self.load_deaths or self.buried or self.suspect or self.unkept)
        )

    @property
    def tier(self) -> Tier:
        if self.stage == "ready":
            return "device"
        return "host" if self.copy == "held" else "disk"

    @property
    def seconds_to_come(self) -> float:
        """What bringing it onto the device is expected to take from where it is; 0: not known."""
        in_host = self.stage != "ready" and self.copy == "held"
        return self.measured.swap_seconds if in_host else self.measured.load_seconds

    @property
    def farness(self) -> float:
        """Times as long as a copy from the host's memory that it takes to come back to the device
        once it has left: 1 with a copy there."""
        if self.copy == "held":
            return 1.0
        swap_s, load_s = self.measured.swap_seconds, self.measured.load_seconds
        return max(load_s / swap_s, 1.0) if swap_s and load_s else _FARNESS

    @property
    def quarantined(self) -> str | None:
        """Why it is kept from engines, however often it is assigned."""
        if self.kept_away is not None:
            return f"quarantined: {self.kept_away}"
        if self.load_deaths >= MAX_DEATHS:
            return f"quarantined: it ended {self.load_deaths} engines as it was loaded"
        if self.buried >= MAX_BURIED:
            return f"quarantined: {self.buried} of its requests ended {MAX_DEATHS} engines each"
        return None

    def fetched(self, fact: ModelFetched, *, apart: bool, share: bool) -> None:
        """Its file is here, and so is what is known of it. `apart`: the engine can tell weights
        from programs of this architecture, as far as is known. `share`: it may share tensors."""
        self.manifest = fact.manifest
        anew = self.digest != fact.manifest.digest
        self.kept_away = fact.quarantined
        # What all workers know and do not hold against it was taken back.
        if anew or (self.kept and not self.unkept):
            self.digest = fact.manifest.digest
            self.load_deaths, self.buried, self.suspect, self.kept = 0, 0, False, False
        layout = fact.layout
        apart = apart and layout is not None and not layout.obstacle and not self.pinned
        self.architecture = layout.architecture if layout is not None else ""
        self.as_copy = None
        if layout is not None and apart:
            self.as_copy = Footprint(layout.weights_bytes, shares=layout.shares if share else ())
        if anew or not self.measured.loaded:
            size = fact.manifest.size_bytes
            self.measured = Measured(size, fact.profile, layout, share=share and apart)
        self.error = self.quarantined

    def is_whole(self, fact: ModelLoaded) -> bool:
        """Whether the engine says that it cannot tell the weights from the program, though the
        file looks so: then it has no copy of them."""
        if self.as_copy is None:
            return False
        if fact.tier == "host":
            return self.as_copy.weights_bytes > fact.weights_bytes == 0
        return fact.architecture == "none"

    def try_later(self, now: float) -> None:
        """Later each time."""
        self.retry_at = now + min(_RETRY_S * 2**self.failures, _RETRY_CAP_S)
        self.failures = min(self.failures + 1, 16)

    def failed(self, message: str, now: float) -> TellPlacer:
        """It is tried again."""
        self.try_later(now)
        self.error = message
        return TellPlacer(f"{self.id} failed: {message}")

    def died_loading(self) -> list[Action]:
        """It ended an engine as it was loaded. Says so once it is to be kept from them."""
        self.load_deaths += 1
        why = f"it ended {self.load_deaths} engines as it was loaded"
        return [*self._died("load", why), *self._judge()] if self.quarantined else []

    def found_dead(self, fact: DeathsFound) -> list[Action]:
        """It ended whole workers as it was loaded, before this one began."""
        self.digest, self.load_deaths, self.suspect = fact.digest, fact.deaths, True
        why = f"it ended {fact.deaths} workers as it was loaded"
        return [*self._died("load", why), *self._judge()] if self.quarantined else []

    def died_running(self) -> list[Action]:
        """One of its items was buried. Says so, and whether it is kept from engines itself."""
        self.buried += 1
        return [
            *self._died("request", f"one of its requests ended {MAX_DEATHS} engines"),
            *self._judge(),
        ]

    def _died(self, kind: Literal["load", "request"], why: str) -> list[Action]:
        self.unkept += 1
        return [KeepDeath(self.id, kind, why)]

    def death_kept(self) -> None:
        """It is written down."""
        self.unkept, self.kept = self.unkept - 1, True

    def _judge(self) -> list[Action]:
        why = self.quarantined
        if why is None:
            return []
        self.error, self.suspect = why, False  # it is not tried again, alone or otherwise
        return [TellPlacer(f"{self.id} failed: {why}")]

    def report(self, *, wanted: bool, bound: bool, saturated: bool) -> ModelReport:
        """`last_used` is monotonic here; whoever sends the report makes it wall time."""
        phase: Phase = "loading" if wanted or self.stage == "loading" else "absent"
        if self.stage == "ready" or (self.served and self.error is None):
            phase = "ready"
        elif self.error is not None:
            phase = "failed"
        return ModelReport(
            model=self.id,
            tier=self.tier,
            phase=phase,
            bound=bound,
            footprint=self.footprint,
            held=self.held,
            saturated=saturated,
            arrived=self.arrived,
            answered=self.answered,
            busy_s=self.busy_s,
            seconds_per_item=self.measured.times.seconds_per_item,
            load_seconds=self.seconds_to_come,
            last_used=self.last_used,
            error=self.error,
            # A verdict that other workers cannot read yet: they would find out by themselves.
            suspect=(self.suspect and self.load_deaths > 0)
            or (self.unkept > 0 and self.quarantined is not None),
        )

    def validate(self) -> None:
        """Raises `AssertionError` where a law does not hold."""
        assert not self.known_to_engine or self.manifest is not None, self
        assert not (self.on_device or self.in_host) or not self.quarantined, self
        assert not self.served or self.admitted, self
        assert 0 <= self.unanswered <= self.held, self
        assert self.unkept >= 0, self


def by_last_use(model: Model) -> tuple[float, ModelId]:
    """Sorts the least recently used first."""
    return model.last_used, model.id
