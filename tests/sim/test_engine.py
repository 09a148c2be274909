"""The engine in virtual time by itself: how its two lanes share the time."""

from __future__ import annotations

import numpy as np
import pytest

from services.worker.core.events import EvictModel, LoadModel
from services.worker.wire import ModelLoaded
from shared.names import ModelId
from sim.agenda import Agenda
from sim.engine import Engine, Event
from tests.sim.rig import model, worker


class Rig:
    """An engine whose answers are kept; `swapped`: two models take turns on its device until
    then, so that its copier is never idle."""

    def __init__(self, *held: int, swapped_until_s: float = 0.0) -> None:
        self.agenda = Agenda()
        self.loaded: dict[ModelId, float] = {}
        """When each was last loaded."""
        self._until_s = swapped_until_s
        swapped = [model(n, mib=10, swap_seconds=0.010) for n in range(2)]
        holds = [model(n, mib=20, load_seconds=1.010, swap_seconds=0.010) for n in held]
        self._swapped = [each.id for each in swapped]
        known = {each.id: each for each in [*swapped, *holds]}
        fleet = worker(room_mib=200, host_mib=1000)
        self.engine = Engine(self.agenda, fleet, known, self._hear, np.random.default_rng(0))
        if swapped_until_s:
            for each in swapped:
                self.engine.submit(LoadModel(each.id, keep_host=True))
        self.run()
        self.began = self.agenda.now
        if swapped_until_s:
            self._until_s += self.began
            for each in swapped:
                self._swap(each.id)
        for each in holds:
            self.engine.submit(LoadModel(each.id, tier="host"))

    def run(self) -> None:
        while self.agenda.next_at < float("inf"):
            self.agenda.step()

    def after(self, number: int) -> float:
        """Seconds until it was loaded."""
        return self.loaded[ModelId(f"m{number}/1")] - self.began

    def _swap(self, name: ModelId) -> None:
        self.engine.submit(EvictModel(name, "device"))
        self.engine.submit(LoadModel(name, keep_host=True))

    def _hear(self, event: Event) -> None:
        if not isinstance(event, ModelLoaded):
            return
        self.loaded[event.model] = self.agenda.now
        if event.model in self._swapped and self.agenda.now < self._until_s:
            self._swap(event.model)


def test_what_is_to_be_held_is_read_while_nothing_is_copied():
    """One after the other, each for what reading it takes."""
    rig = Rig(2, 3)
    rig.run()
    assert rig.after(2) == pytest.approx(1.0, abs=0.01)
    assert rig.after(3) == pytest.approx(2.0, abs=0.01)


def test_a_hold_gets_on_while_models_are_swapped_all_the_time():
    """A piece of 2 MiB after each copy of 10 ms: ten pieces of 100 ms are read long before the
    swaps end, and not for nothing."""
    rig = Rig(2, swapped_until_s=5.0)
    rig.run()
    assert 1.0 < rig.after(2) < 1.4


def test_a_held_model_that_is_waited_for_is_read_first():
    """Who wants it on the device does not wait for others' reads."""
    rig = Rig(2, 3)
    rig.engine.submit(LoadModel(ModelId("m3/1"), keep_host=True))
    rig.run()
    assert rig.after(3) == pytest.approx(1.010, abs=0.01)
    assert rig.after(2) == pytest.approx(2.0, abs=0.03)
