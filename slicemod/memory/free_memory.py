"""`free_memory`: the one place that reads a device's free memory, and decides how long a reading is used."""

import math
import os
import sys
import time
from collections.abc import Callable

import torch

from slicemod.memory.accelerator_memory import free_accelerator_memory, free_metal_memory
from slicemod.memory.cpu_memory import free_cpu_memory, has_limited_addresses

_CPU = torch.device("cpu")
_NEVER = 0, -math.inf

# How long a reading is used at most where memory can be used up at once, in seconds. An attention call takes about as
# long, and a plan has to hold during it anyway.
_RECENT = 0.01
# Elsewhere a CPU's memory is in use once something is written to it. No core writes this fast, and no machine: the
# memory of a large server takes about 0.5 TB/s. After other work a reading takes 0.1 ms, which is much for small calls,
# and little once in this time: limits may change without a write.
_CPU_BYTES_PER_SECOND = min(2**36 * (os.cpu_count() or 2**4), 2**40)
_CPU_SECONDS = 0.1
_SMALL_SHARE = 1 / 16  # of an accelerator's free memory, see `left_of_accelerator_memory`; a choice, not measured


def _nothing(free: int, age: float) -> float:
    """For readings that must not be used again."""
    return 0


class MemoryProbe:
    """Reads the free memory of the devices of one type, and remembers the last reading of each device.

    Args:
        read: takes a device, and returns the bytes that can still be allocated there; None if that cannot be told.
        remains: takes the bytes that were free and the seconds since then, and returns how many are certainly still
            free. By default none are, so every question is answered by `read`.
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
            RuntimeError: the free memory of the device cannot be read.
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
        """Bytes that are certainly free on `device` according to the last reading; 0 if that is too old."""
        free, read_at = self._last.get(device, _NEVER)
        return self._remains(free, time.monotonic() - read_at)


def left_of_cpu_memory(free: int, age: float) -> float:
    """Bytes of a CPU's memory that are still free, `age` seconds after `free` bytes were.

    It subtracts what could have been written in this time. An address space is used up by allocations alone, so nothing
    is certain if it is limited. What Windows still commits is used up by allocations too, so there this does not last.
    """
    if age > (_RECENT if sys.platform == "win32" else _CPU_SECONDS) or has_limited_addresses():
        return 0
    return max(0, free - _CPU_BYTES_PER_SECOND * age)


def left_of_accelerator_memory(free: int, age: float) -> float:
    """Bytes of an accelerator's memory to rely on, `age` seconds after `free` bytes were free.

    An accelerator's memory is in use as soon as it is allocated, which takes almost no time. So only a small share is
    relied on. It is not certain, but a device that has lost all the rest in 10 ms would not have room for the output
    of the call either.
    """
    return 0 if age > _RECENT else free * _SMALL_SHARE


_ACCELERATORS = MemoryProbe(free_accelerator_memory, left_of_accelerator_memory)

# The probe of each device type. A type without a probe is read as CUDA is. You may add one for another backend, or
# replace one to see what attention does with less memory.
PROBES: dict[str, MemoryProbe] = {
    "cpu": MemoryProbe(lambda device: free_cpu_memory(), left_of_cpu_memory),
    "mps": MemoryProbe(lambda device: free_metal_memory(), left_of_accelerator_memory),
}


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on `device`.

    cuda, ROCm, xpu and other accelerators: what the driver has free, plus what PyTorch's cache holds unused.
    mps: the recommended working set minus what tensors occupy. cpu: the available RAM, or less if the process is
    limited: on Linux by a cgroup (v1 or v2) or by `RLIMIT_AS`, on Windows by what the system still commits.

    Raises:
        RuntimeError: the free memory of the device cannot be read. Give the budget in bytes instead.
    """
    device = torch.device(device)
    return _probe_of(device).free(device)


def surely_free(device: torch.device) -> float:
    """Bytes that are known to be free on `device`, without reading its memory; 0 if nothing is known."""
    return _probe_of(device).surely_free(device)


def _probe_of(device: torch.device) -> MemoryProbe:
    # Every call on a CPU comes here. Comparing two devices is faster than asking a device for its type.
    return PROBES["cpu"] if device == _CPU else PROBES.get(device.type, _ACCELERATORS)
