"""Which model runs next. Between tenants, device time is shared by weight; within a tenant it is
the model with the most urgent item, but none takes more than two batches in a row while others
wait, so that a spiking model fills only its own share.

Start-time fair queuing (Goyal, Vin, Cheng 1996): a tenant's clock advances by the device seconds
that its batches take, over its share, and the tenant whose clock is furthest behind is next. Laws:
- While two tenants both have something that can run, the device seconds that each gets, over its
  share, differ by at most one batch of each (over its share), however many models each has.
- Work-conserving: what a tenant cannot use now goes to the others, and it gets no credit for
  that: who begins to wait begins at the common time, which is the clock of the last that ran.
- A batch is charged as it is handed over by what it should take, and put right once it is measured.
- With one tenant nothing is weighed at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from shared.names import ModelId

MAX_IN_A_ROW: Final = 2

Waiting = Iterable[tuple[float, ModelId]]
"""Models that something waits for, each with when that is due: the most urgent first."""
MayRun = Callable[[ModelId], bool]


class Turns:
    """Of the models of one tenant."""

    def __init__(self) -> None:
        self._last: ModelId | None = None
        self._in_a_row = 0

    def __repr__(self) -> str:
        return f"Turns(last={self._last}, in_a_row={self._in_a_row})"

    def choose(self, waiting: Waiting, may: MayRun) -> ModelId | None:
        """The first of these that may run, or the second when the first has had its turns. None
        when none may run."""
        able = (model for _, model in waiting if may(model))
        first = next(able, None)
        if first is None or first != self._last or self._in_a_row < MAX_IN_A_ROW:
            return first
        return next(able, first)

    def ran(self, model: ModelId) -> None:
        """A batch of `model` was handed to the engine."""
        self._in_a_row = self._in_a_row + 1 if model == self._last else 1
        self._last = model


class _Tenant:
    """One that has something waiting or under way, or had more than its part of late."""

    __slots__ = ("clock", "models", "passed_over", "running", "turns")

    def __init__(self, clock: float) -> None:
        self.clock = clock
        """Device seconds that it was given, over its share, on the common scale."""
        self.models = 0
        """Of its models, those that something waits for."""
        self.running = 0
        """Batches of it that are under way."""
        self.turns = Turns()
        self.passed_over = 0.0
        """On the same scale, what others were given since it last ran, as it waits and cannot."""

    def __repr__(self) -> str:
        return f"{self.clock:.3f} ({self.models} waiting, {self.running} running)"


class FairTurns:
    """Between tenants, and within each."""

    def __init__(self) -> None:
        self.shares: Mapping[str, float] = {}
        """Weights of tenants; 1 for the others."""
        self._tenants: dict[str, _Tenant] = {}
        self._waiting: dict[str, _Tenant] = {}
        """Those of which something waits, who began first before the others."""
        self._now = 0.0
        """The common time: the clock of the last that ran, as it began."""

    def __repr__(self) -> str:
        return f"FairTurns({self._now:.3f}, {self._tenants})"

    # --- who waits --------------------------------------------------------------------------

    def waits(self, tenant: str) -> None:
        """Something begins to wait for one more model of the tenant."""
        known = self._tenants.get(tenant)
        if known is None:
            known = self._tenants[tenant] = _Tenant(self._now)
        if not known.models:
            self._waiting[tenant] = known
            known.clock = max(known.clock, self._now)
        known.models += 1

    def waits_no_more(self, tenant: str) -> None:
        """Nothing waits for one of its models any more."""
        known = self._tenants[tenant]
        known.models -= 1
        if not known.models:
            del self._waiting[tenant]
            known.passed_over = 0.0
            if len(self._tenants) > 1 and not known.running:
                self._forget_idle(tenant)

    # --- who runs ---------------------------------------------------------------------------

    def choose(
        self, waiting: Waiting, may: MayRun, tenant_of: Mapping[ModelId, str]
    ) -> ModelId | None:
        """Whose batch is next; None when none of these may run. `tenant_of`: all that waits."""
        if len(self._waiting) < 2:
            for known in self._waiting.values():
                return known.turns.choose(waiting, may)
            return None
        found = None
        unable: list[_Tenant] = []
        for tenant, known in sorted(self._waiting.items(), key=_by_clock):
            own = (each for each in waiting if tenant_of[each[1]] == tenant)
            found = known.turns.choose(own, may)
            if found is not None:
                # What cannot run now gets no credit for it.
                for other in unable:
                    other.passed_over += known.clock - other.clock
                    other.clock = known.clock
                break
            unable.append(known)
        return found

    def handed_over(self, model: ModelId, tenant: str, expected_s: float) -> None:
        """A batch of `model` was handed to the engine, and should take so long (0: not known)."""
        known = self._tenants.get(tenant)
        if known is None:
            known = self._tenants[tenant] = _Tenant(self._now)
        self._now = max(self._now, known.clock)
        known.clock += expected_s / self.shares.get(tenant, 1.0)
        known.passed_over = 0.0
        known.running += 1
        known.turns.ran(model)

    def ended(self, tenant: str, expected_s: float, took_s: float) -> None:
        """It took so long instead."""
        known = self._tenants[tenant]
        known.clock += (took_s - expected_s) / self.shares.get(tenant, 1.0)
        known.running -= 1
        if len(self._tenants) > 1 and not (known.running or known.models):
            self._forget_idle(tenant)

    def passed_over(self, tenant: str) -> float:
        """Device seconds, over its share, that others were given since the tenant last ran, as it
        waits for what is not on the device."""
        known = self._waiting.get(tenant)
        return 0.0 if known is None else known.passed_over

    def validate(self, waiting: Mapping[str, int], running: Mapping[str, int]) -> None:
        """Raises `AssertionError` unless, by tenant, something waits for so many models and so
        many batches run."""
        told = {name: each.models for name, each in self._tenants.items() if each.models}
        assert told == dict(waiting), self
        assert self._waiting.keys() == told.keys(), self
        assert {n: each.running for n, each in self._tenants.items() if each.running} == running

    # --- parts ------------------------------------------------------------------------------

    def _forget_idle(self, last: str) -> None:
        """Who is idle and owes nothing is as one that is new; of the one that ran last the turns
        are kept."""
        idle = [
            name
            for name, each in self._tenants.items()
            if not (each.models or each.running) and each.clock <= self._now and name != last
        ]
        for name in idle:
            del self._tenants[name]


def _by_clock(each: tuple[str, _Tenant]) -> float:
    return each[1].clock
