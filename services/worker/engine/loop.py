"""The engine's main loop: three threads, each with one kind of work.

The main thread reads commands and hands them on. The dispatch thread runs models. The loader
thread loads and evicts. Every way to end is `os._exit`: a thread inside a model cannot be asked
to stop, and there is nothing to save.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

import torch

from services.worker.arena import Arena
from services.worker.engine.channel import BadFrame, Channel
from services.worker.engine.dispatch import DeviceLost, Dispatcher
from services.worker.engine.loading import Loader
from services.worker.engine.memory import Device
from services.worker.engine.outbox import Outbox
from services.worker.wire import (
    EngineFailed,
    EngineStarted,
    EvictModel,
    LoadModel,
    MeasureMemory,
    MemoryMeasured,
    Release,
    RunBatch,
    Stop,
)

EXIT_OK: Final = 0
EXIT_DEVICE_LOST: Final = 70
"""Told by `EngineFailed` before: the device's context is lost, or the engine itself is faulty."""
EXIT_BAD_FRAME: Final = 71


def serve(
    channel: Channel, inbox: Arena, outbox_arena: Arena, device: Device, budget_bytes: int
) -> NoReturn:
    """Works until the agent says stop or is gone, then ends the process."""
    outbox = Outbox(outbox_arena)
    dispatcher = Dispatcher(device, inbox, outbox, channel.send)
    loader = Loader(device, budget_bytes, dispatcher, channel.send)

    def dispatch() -> NoReturn:
        dispatcher.serve()
        end(EXIT_OK)

    def load() -> None:
        loader.serve()
        dispatcher.finish()

    channel.send(
        EngineStarted(
            device.kind,
            device.name,
            device.uuid,
            device.capacity_bytes,
            device.base_bytes,
            str(torch.__version__),
        )
    )
    for name, target in (("dispatch", dispatch), ("load", load)):
        guarded = _guarded(target, channel)
        threading.Thread(target=guarded, name=name, daemon=True).start()
    _guarded(lambda: _read(channel, dispatcher, loader, outbox, device), channel)()
    end(EXIT_OK)


def _read(
    channel: Channel, dispatcher: Dispatcher, loader: Loader, outbox: Outbox, device: Device
) -> None:
    """Until the agent is gone. After `Stop` too: the last outputs may wait for a `Release`."""
    for command in channel.commands():
        match command:
            case RunBatch():
                dispatcher.submit(command)
            case Release():
                outbox.release(command.batches)
            case LoadModel() | EvictModel():
                loader.submit(command)
            case MeasureMemory():
                channel.send(MemoryMeasured(device.used_bytes()))
            case Stop():
                loader.finish()


def _guarded(target: Callable[[], None], channel: Channel) -> Callable[[], None]:
    """No thread of the engine may end unseen: an error ends the process, and says why."""

    def run() -> None:
        try:
            target()
        except BadFrame as error:
            print(f"no command: {error}", file=sys.stderr)  # noqa: T201
            end(EXIT_BAD_FRAME)
        except OSError as error:
            if isinstance(error, ConnectionError):  # the agent is gone, and nobody to tell
                end(EXIT_OK)
            fail(channel, error)
        except Exception as error:  # noqa: BLE001 — told and ended
            fail(channel, error)

    return run


def fail(channel: Channel, error: Exception) -> NoReturn:
    """Tells the agent why the engine cannot go on, and ends."""
    if not isinstance(error, DeviceLost):
        traceback.print_exception(error)
    try:
        channel.send(EngineFailed(str(error) or type(error).__name__))
    finally:
        end(EXIT_DEVICE_LOST)


def end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
