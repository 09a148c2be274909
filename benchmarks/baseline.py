"""The baselines, in this process: a bare copy, a plain load, a bare loop."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch


def device_of(name: str) -> torch.device:
    return torch.device("cuda:0" if name.startswith("cuda") else "cpu")


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 — Linux tells it there
        for line in file:
            if line.startswith("model name"):
                return f"cpu: {line.split(':', 1)[1].strip()}"
    return "cpu"


def described(device: str) -> tuple[str, str]:
    """What it runs on, and torch's version."""
    return describe(device_of(device)), str(torch.__version__)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BareCopy:
    """The same bytes from the host's memory to the device's, both there already."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device = device
        self._from = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._to = torch.ones(nbytes, dtype=torch.uint8, device=device)
        self.seconds()

    def seconds(self) -> float:
        wait(self._device)
        began = time.perf_counter()
        self._to.copy_(self._from, non_blocking=True)
        wait(self._device)
        return time.perf_counter() - began


def load(path: str, device: torch.device) -> Any:
    """As anybody loads a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        module: Any = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    return module.eval()


def load_and_two_calls(path: str, inputs: Sequence[torch.Tensor], device: torch.device) -> float:
    """Seconds until a plain load runs at its steady speed: its first two calls are slow."""
    began = time.perf_counter()
    with torch.inference_mode():
        module = load(path, device)
        for _ in range(2):
            module(*(each.to(device) for each in inputs))
        wait(device)
    return time.perf_counter() - began


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """The settings that the engine has, so that a baseline computes the same."""
    jit: Any = torch.jit
    with jit.optimized_execution(False), torch.inference_mode():
        yield


def bare_loop(module: Any, inputs: Sequence[torch.Tensor], device: torch.device, s: float) -> float:
    """Batches per second of a loop that does nothing but run the model, outputs on the host."""
    count, began = 0, time.perf_counter()
    with steady():
        while (took := time.perf_counter() - began) < s:
            output = module(*(each.to(device, non_blocking=True) for each in inputs))
            output.cpu()
            count += 1
    return count / took
