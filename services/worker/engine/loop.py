"""The engine's threads, each with one kind of work.

The main thread reads the control socket and hands on what it hears. The dispatch thread reads
the batches and runs models; where the device works beside it, another one answers. The copier
moves weights, and the grapher does what takes long of a load. Every way to end is `os._exit`: a
thread inside a model cannot be asked to stop, and there is nothing to save.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

import torch

from services.worker.confinement.plan import Measure
from services.worker.engine.channel import Channel
from services.worker.engine.dispatch import DeviceLost, Dispatcher
from services.worker.engine.failures import MAX_MESSAGE
from services.worker.engine.loading import Loader
from services.worker.engine.memory import Device
from services.worker.frames import BadFrame
from services.worker.wire import (
    EngineFailed,
    EngineStarted,
    EvictModel,
    LoadModel,
    Stop,
)

EXIT_OK: Final = 0
EXIT_DEVICE_LOST: Final = 70
"""Told by `EngineFailed` before: the device's context is lost, or the engine itself is faulty."""
EXIT_BAD_FRAME: Final = 71


def serve(
    channel: Channel,
    dispatcher: Dispatcher,
    loader: Loader,
    device: Device,
    confinement: tuple[Measure, ...] = (),
) -> NoReturn:
    """Works until the agent says stop or is gone, then ends the process."""

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
            confinement,
        )
    )
    for name, target in (
        ("dispatch", dispatch),
        ("answer", dispatcher.serve_answers),
        ("copy", load),
        ("graph", loader.serve_graphs),
    ):
        guarded = _guarded(target, channel, device)
        threading.Thread(target=guarded, name=name, daemon=True).start()
    _guarded(lambda: _read(channel, loader), channel, device)()
    end(EXIT_OK)


def _read(channel: Channel, loader: Loader) -> None:
    """Until the agent is gone. After `Stop` too: batches may be under way for long."""
    for command in channel.commands():
        match command:
            case LoadModel() | EvictModel():
                loader.submit(command)
            case Stop():
                loader.finish()


def _guarded(target: Callable[[], None], channel: Channel, device: Device) -> Callable[[], None]:
    """No thread of the engine may end unseen: an error ends the process, and says why."""

    def run() -> None:
        try:
            device.enter_thread()
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
        channel.send(EngineFailed(str(error)[:MAX_MESSAGE] or type(error).__name__))
    finally:
        end(EXIT_DEVICE_LOST)


def end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
