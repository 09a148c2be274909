"""`python -m services.worker.engine`: started by the agent, with four inherited descriptors
and an environment without credentials."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import os
import signal
import socket
import sys
from typing import Final, NoReturn

import msgspec

from services.worker.confinement.confine import Confined
from services.worker.confinement.plan import Confinement

_PR_SET_PDEATHSIG: Final = 1
_M_ARENA_MAX: Final = -8
_M_MMAP_THRESHOLD: Final = -3
_M_TRIM_THRESHOLD: Final = -1
_SWITCH_INTERVAL_S: Final = 0.0001
"""How long a thread that loads may keep the interpreter from the one that runs models."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.worker.engine")
    parser.add_argument("--control-fd", type=int, required=True, help="socket about models")
    parser.add_argument("--batch-fd", type=int, required=True, help="socket about batches")
    parser.add_argument("--inbox-fd", type=int, required=True, help="shared memory of inputs")
    parser.add_argument("--outbox-fd", type=int, required=True, help="shared memory of outputs")
    parser.add_argument("--device", required=True, help="cpu or cuda:<n>")
    parser.add_argument("--budget-bytes", type=int, required=True, help="for all models together")
    parser.add_argument("--host-bytes", type=int, default=0, help="for weights in host memory")
    parser.add_argument("--share", type=int, default=1, help="0: no tensor in two models")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operator")
    parser.add_argument("--confinement", default="{}", help="JSON, see confinement/plan.py")
    return parser.parse_args()


def _live_and_die_with_the_agent(agent: int) -> None:
    """The agent alone decides when the engine ends. A signal to the whole process group (Ctrl-C,
    a supervisor's SIGTERM) must not take away the batches that the agent wants to finish; and
    when the agent is killed, a thread in the midst of a model must not live on. To be called after
    every change of user or namespace, which lets the kernel forget it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:  # it died before we had asked
        os._exit(0)


def _one_heap() -> None:
    """Threads share glibc's main heap: of the others, `malloc_trim` leaves the top standing, up
    to 64 MB of weights that were evicted. And the heap keeps what a batch leaves behind: given
    back and taken again for every batch, its pages would be faulted in each time (a tenth of a
    large batch's time); what an eviction leaves is trimmed at once all the same. To be called
    before there are other threads."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def main() -> NoReturn:
    agent = os.getppid()
    arguments = _arguments()
    faulthandler.enable()
    _one_heap()
    # Before there are threads, which torch and its libraries start as they are imported.
    asked = msgspec.json.decode(arguments.confinement, type=Confinement)
    confined = Confined(asked, arguments.device, arguments.budget_bytes)
    confined.enter()
    _live_and_die_with_the_agent(agent)

    # Here and not above: torch takes seconds to import, and the rest should come before it.
    import torch

    from services.worker.arena import Arena
    from services.worker.engine.channel import BatchChannel, Channel
    from services.worker.engine.dispatch import Dispatcher
    from services.worker.engine.loading import Loader
    from services.worker.engine.loop import fail, serve
    from services.worker.engine.memory import open_device
    from services.worker.engine.outbox import Outbox

    torch.set_num_threads(max(arguments.threads, 1))
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    channel = Channel(socket.socket(fileno=arguments.control_fd))
    batches = BatchChannel(socket.socket(fileno=arguments.batch_fd))
    inbox = Arena.attach(arguments.inbox_fd)
    outbox = Outbox(Arena.attach(arguments.outbox_fd))
    try:
        device = open_device(arguments.device, arguments.budget_bytes)
        dispatcher = Dispatcher(device, inbox, outbox, batches)
        loader = Loader(
            device,
            arguments.budget_bytes,
            dispatcher,
            channel.send,
            host_bytes=arguments.host_bytes,
            share=bool(arguments.share),
        )
        # Nothing of a stranger's has run, and nothing more is to be opened but models.
        confined.seal()
    except (RuntimeError, ValueError) as error:
        fail(channel, error)
    if confined.missing:
        fail(channel, RuntimeError(f"confinement is required: {'; '.join(confined.missing)}"))
    # What is imported by now stays: a collection after an eviction need not look at it again.
    gc.collect()
    gc.freeze()
    serve(channel, dispatcher, loader, device, confined.measures)


main()
