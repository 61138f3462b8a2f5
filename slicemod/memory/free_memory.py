"""`free_memory`: the one place that asks how much memory a device has free, and what is left of the last answer."""

import math
import sys
import time
from collections.abc import Callable

import torch

from slicemod.memory.accelerator_memory import free_accelerator_memory, free_metal_memory
from slicemod.memory.cpu_memory import free_cpu_memory, has_limited_addresses

_CPU = torch.device("cpu")
_NEVER = 0, -math.inf

# How long an answer is of use at all, in seconds: about as long as the call that it was read for takes.
_RECENT = 0.01
# More than a machine writes: a fast one writes 0.5 TB/s to its memory.
_CPU_BYTES_PER_SECOND = 2**40
_SMALL_SHARE = 1 / 16


def _nothing(free: int, age: float) -> float:
    """What is left of an answer that holds for no time."""
    return 0


class MemoryProbe:
    """Says how much memory the devices of one type have free, and remembers the last answer for each of them.

    Args:
        read: bytes that can still be allocated on a device; None where that cannot be told.
        remains: how many of the bytes that were free are certain to be free so many seconds later. The default is
            none, so that every question is answered by `read`.
    """

    def __init__(
        self, read: Callable[[torch.device], int | None], remains: Callable[[int, float], float] = _nothing
    ) -> None:
        self._read = read
        self._remains = remains
        self._last: dict[torch.device, tuple[int, float]] = {}  # bytes, and time.monotonic() before they were read

    def free(self, device: torch.device) -> int:
        """Bytes that can be allocated on `device` now.

        Raises:
            RuntimeError: that cannot be told.
        """
        read_at = time.monotonic()
        free = self._read(device)
        if free is None:
            raise RuntimeError(
                f"free_memory: no way to read the free memory of {str(device)!r} on {sys.platform}; expected a device "
                'that reports it. Name a budget in bytes instead, such as SliceConfig(budget="2GiB").'
            )
        self._last[device] = free, read_at
        return free

    def surely_free(self, device: torch.device) -> float:
        """Bytes that are free on `device` by the last answer, without another look; 0 where that is too old."""
        free, read_at = self._last.get(device, _NEVER)
        return self._remains(free, time.monotonic() - read_at)


def left_of_cpu_memory(free: int, age: float) -> float:
    """Bytes of a CPU's memory that are still free `age` seconds after `free` bytes were.

    Memory is in use once it is written to, and nobody writes that fast. An address space is used up without a write:
    where that is limited, nothing is certain.
    """
    if age > _RECENT or has_limited_addresses():
        return 0
    return free - _CPU_BYTES_PER_SECOND * age


def left_of_accelerator_memory(free: int, age: float) -> float:
    """Bytes of an accelerator's memory to be relied on `age` seconds after `free` bytes were free.

    Its memory is taken when it is allocated, out of PyTorch's cache in no time. So this is a small share, and no
    certainty: but a device that has lost all the rest meanwhile would have no room for the output of the call either.
    """
    return 0 if age > _RECENT else free * _SMALL_SHARE


_ACCELERATORS = MemoryProbe(free_accelerator_memory, left_of_accelerator_memory)

# By the type of a device; a type without a probe is asked as CUDA is. Add one for a backend of its own, or replace one
# to see what attention does with less memory.
PROBES: dict[str, MemoryProbe] = {
    "cpu": MemoryProbe(lambda device: free_cpu_memory(), left_of_cpu_memory),
    "mps": MemoryProbe(lambda device: free_metal_memory(), left_of_accelerator_memory),
}


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on `device`.

    cuda, ROCm, xpu and other accelerators: what the driver has free plus what PyTorch's cache holds unused.
    mps: the recommended working set less what tensors occupy. cpu: the smallest of available RAM and of what limits the
    process: on Linux the headroom of every cgroup (v1 and v2) that it is in and that under `RLIMIT_AS`, on Windows
    what may still be committed.

    Raises:
        RuntimeError: the device does not say; name a budget in bytes instead.
    """
    device = torch.device(device)
    return _probe_of(device).free(device)


def surely_free(device: torch.device) -> float:
    """Bytes that are known to be free on `device` without a look at it; 0 where nothing is known."""
    return _probe_of(device).surely_free(device)


def _probe_of(device: torch.device) -> MemoryProbe:
    # Asked at every call on a CPU, and to compare devices takes less time than to tell the type of one.
    return PROBES["cpu"] if device == _CPU else PROBES.get(device.type, _ACCELERATORS)
