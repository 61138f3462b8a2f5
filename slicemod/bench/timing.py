"""How long a call takes on a device, and the large matrix product that other calls are measured by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

PRODUCT_SIZE = 2048
LONGEST_PRODUCT = 1.0  # seconds
_SMALL_PRODUCT = 256
SHORTEST_SPAN = 0.05  # seconds


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a CUDA device between two events on its stream, the work before it done.

    A call shorter than `SHORTEST_SPAN` is repeated until it fills it, and the mean is told: caches that the peer before
    left cold and threads that have to wake up would otherwise make small works look slower than they are in a model.

    >>> seconds_of(lambda: sum(range(1000)), torch.device("cpu")) > 0
    True
    """
    seconds = _seconds_of(call, 1, device)
    repeats = math.ceil(SHORTEST_SPAN / seconds)
    return seconds if repeats <= 1 else _seconds_of(call, repeats, device) / repeats


def _seconds_of(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        event: Any = torch.cuda.Event  # PyTorch leaves it without types
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3
    start_time = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start_time


class LargeProduct:
    """A square matrix product of `PRODUCT_SIZE` rows, whose FLOP/s are what this machine can do.

    Of fewer where that would take over `LONGEST_PRODUCT`: some processors have no instructions for half precision, and
    PyTorch multiplies it a hundred times slower than float32 there.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        size = min(_SMALL_PRODUCT, PRODUCT_SIZE)
        self._make(size, dtype, device)
        self()  # the first product of all starts threads or a GPU's libraries
        while 2 * size <= PRODUCT_SIZE and 2**3 * seconds_of(self, device) <= LONGEST_PRODUCT:
            size *= 2
            self._make(size, dtype, device)

    def _make(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.left, self.right = torch.randn(2, size, size, device=device).to(dtype).unbind()

    def __call__(self) -> object:
        """One product."""
        return self.left @ self.right

    @property
    def flops(self) -> int:
        """Floating-point operations of one call."""
        return int(2 * self.left.shape[0] ** 3)
