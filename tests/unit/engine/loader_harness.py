"""A loader with its two threads, and nothing that runs batches."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager

import torch

from services.worker.engine.loading import Loader
from services.worker.engine.memory import open_device
from services.worker.engine.outputs import named
from services.worker.engine.unrest import Unrest
from services.worker.wire import EvictModel, MemoryMeasured, ModelEvicted
from tests.unit.engine.engine_harness import command

BUDGET_BYTES = 64 << 20
DEADLINE_S = 30.0


class Dispatcher:
    """Runs on the spot what it is given."""

    def __init__(self):
        self.residents = {}
        self.unrest = Unrest()
        self.calling = False
        self.ran = 0

    def call(self, function):
        self.calling = True
        try:
            return function()
        finally:
            self.calling = False

    def outputs_of(self, executor, manifest, inputs, rows):
        self.ran += 1
        return named(executor.run(inputs), manifest.outputs)


class Counted:
    """A CPU that counts how often its memory was collected."""

    def __init__(self):
        self._cpu = open_device("cpu", 0)
        self.reclaims = 0

    def __getattr__(self, name):
        return getattr(self._cpu, name)

    def reclaim(self):
        self.reclaims += 1
        self._cpu.reclaim()


class LostDevice(Counted):
    """A CPU that is found dead when it is asked."""

    def healthy(self):
        return False


class Rig:
    """A loader with its two threads, and what it says."""

    def __init__(self, device=None, **options):
        self.dispatcher = Dispatcher()
        self.memory = MemoryMeasured(0)
        self.lost = queue.SimpleQueue()
        self._talks = threading.Event()
        self._talks.set()
        self._events = queue.SimpleQueue()
        device = device or open_device("cpu", 0)
        self.loader = Loader(device, BUDGET_BYTES, self.dispatcher, self._say, **options)
        self._threads = [
            threading.Thread(target=self._run, args=(target,), daemon=True)
            for target in (self.loader.serve, self.loader.serve_graphs)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, target):
        try:
            target()
        except Exception as lost:  # noqa: BLE001 — the engine would end
            self.lost.put(lost)

    def _say(self, event):
        assert self._talks.wait(DEADLINE_S)
        self._events.put(event)

    @contextmanager
    def busy(self):
        """All that is submitted meanwhile is there before the copier looks at any of it."""
        self._talks.clear()
        self.loader.submit(EvictModel("nobody/1"))
        try:
            yield
        finally:
            self._talks.set()
        assert self.event() == ModelEvicted("nobody/1", "device")

    def event(self):
        while True:
            event = self._events.get(timeout=DEADLINE_S)
            if not isinstance(event, MemoryMeasured):
                return event
            self.memory = event

    def quiet(self):
        """It has said nothing more, but for memory."""
        while not self._events.empty():
            if not isinstance(self._events.get(), MemoryMeasured):
                return False
        return True

    def do(self, order):
        self.loader.submit(order)
        return self.event()

    def load(self, *arguments, **options):
        return self.do(command(*arguments, **options))

    def evict(self, model, tier="device"):
        assert self.do(EvictModel(model, tier)) == ModelEvicted(model, tier)

    def run(self, model, x=None):
        executor = self.dispatcher.residents[model].executor
        with torch.inference_mode():
            return executor.run([("x", torch.ones(1, 4) if x is None else x)])

    def end(self):
        self.loader.finish()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        assert not any(thread.is_alive() for thread in self._threads)
