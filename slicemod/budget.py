"""Memory budgets: "2GiB", a fraction or "auto" in bytes, and the one place that reads what a device has free."""

import math
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    import resource
except ImportError:  # it is POSIX's
    resource = None  # type: ignore[assignment]

ACCEPTED_BUDGETS = '"auto", bytes such as 536870912, a size such as "512MiB" or "2GB", or a fraction such as 0.25'

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|B|[KMGT]i?B)")

# cgroup v1 writes "no limit" as the largest page-aligned 63-bit int.
_CGROUP_V1_UNLIMITED = 1 << 62

_MEMINFO, _STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
_MEMBERSHIP, _CGROUP_MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_MEM_AVAILABLE = re.compile(rb"^MemAvailable: *(\d+) kB$", flags=re.MULTILINE)
_READ_AT_ONCE = 2**16  # bytes

_CPU = torch.device("cpu")

# How old a reading of free memory may be, and more than a machine writes. A GPU's is taken when it is allocated, of
# PyTorch's cache in no time: there, what is this much less than what was free.
_RECENT_SECONDS = 0.01
_BYTES_PER_SECOND = 2**40
_SMALL_SHARE = 1 / 16
_NEVER = 0, -math.inf
_last_readings: dict[torch.device, tuple[int, float]] = {}  # bytes, and time.monotonic() before they were read


def parse_budget(budget: object, available: int | None = None) -> int | float:
    """Bytes of `budget`, or the fraction itself when `available` bytes are not given and it needs them.

    >>> parse_budget("512MiB"), parse_budget("2GB"), parse_budget(0.25, available=1000)
    (536870912, 2000000000, 250)

    Raises:
        ValueError: `budget` has none of the accepted forms, or is not positive.
    """
    if budget == "auto":
        budget = 1.0
    if isinstance(budget, str):
        match = _SIZE.fullmatch(budget.strip())
        if match is None or ("." in match[1] and not match[2]):
            raise _refusal(budget)
        size = float(match[1]) * _UNITS[match[2]]
        if not 1 <= size < math.inf:
            raise _refusal(budget)
        return int(size)
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise _refusal(budget)
    if isinstance(budget, int):
        if budget < 1:
            raise _refusal(budget)
        return budget
    if not 0.0 < budget <= 1.0:  # also refuses NaN
        raise _refusal(budget)
    return budget if available is None else int(budget * available)


def _refusal(budget: object) -> ValueError:
    return ValueError(f"budget: expected {ACCEPTED_BUDGETS}; got {budget!r}. Write it in one of these forms.")


def budget_bytes(budget: int | float | str, device: torch.device) -> int:
    """Bytes that `budget` allows on `device`; reads the free memory only where the budget refers to it.

    Raises:
        ValueError: `budget` has none of the accepted forms.
        RuntimeError: the budget refers to free memory and the device has no probe for it.
    """
    parsed = parse_budget(budget)
    return parsed if isinstance(parsed, int) else int(parsed * free_memory(device))


def surely_allows(parsed: int | float, size: int, device: torch.device) -> bool:
    """A budget, as `parse_budget` gives it, allows `size` bytes, and that is known without a look at the device.

    A fraction of what is free is known where the last reading is no older than what many a call takes. Of a CPU, where
    it left more than anybody can have written to since: memory is free until it is written to. An address space is used
    up by less; where that is limited, nothing is known. Of another device, where `size` is a small share of what was
    free: that is no certainty, but one that has lost the rest meanwhile would have no room for the output either.
    """
    if isinstance(parsed, int):
        return size <= parsed
    if free_memory is not _PROBE:  # replaced: a device is simulated, as it likes
        return False
    free, read_at = _last_readings.get(device, _NEVER)
    age = time.monotonic() - read_at
    if age > _RECENT_SECONDS:
        return False
    if device != _CPU:
        return size <= parsed * _SMALL_SHARE * free
    return not _has_limited_addresses() and size <= parsed * (free - _BYTES_PER_SECOND * age)


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on `device`.

    cuda, ROCm, xpu and other accelerators: what the driver has free plus what PyTorch's cache holds unused.
    mps: the recommended working set less what the driver has allocated. cpu: the smallest of available RAM, the
    headroom of every cgroup (v1 and v2) the process is in, and the headroom under `RLIMIT_AS`.

    Raises:
        RuntimeError: there is no probe for the device; name a budget in bytes instead.
    """
    read_at = time.monotonic()
    if device == _CPU:  # an answer that is asked for often, and a device's type takes longer to tell
        free = _free_cpu_memory()
    else:
        device = torch.device(device)
        free = _free_cpu_memory() if device.type == "cpu" else _free_device_memory(device)
    _last_readings[torch.device(device)] = free, read_at
    return free


_PROBE = free_memory


def _free_device_memory(device: torch.device) -> int:
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    backend: Any = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info") or not hasattr(backend, "memory_stats_as_nested_dict"):
        raise RuntimeError(_no_probe(str(device)))
    # Nested as it comes; to sort it flat takes PyTorch longer than the rest of a call.
    stats = backend.memory_stats_as_nested_dict(device)
    cached = _current(stats, "reserved_bytes") - _current(stats, "active_bytes")
    return int(backend.mem_get_info(device)[0] + cached)


def _current(stats: dict[str, Any], name: str) -> int:
    return int(stats[name]["all"]["current"]) if name in stats else 0


def _no_probe(device: str) -> str:
    return (
        f"free_memory: no way to read the free memory of {device!r} on {sys.platform}; expected a device that "
        'reports it. Name a budget in bytes instead, such as SliceConfig(budget="2GiB").'
    )


def _free_cpu_memory() -> int:
    if sys.platform == "darwin":
        return _macos_available()
    if not sys.platform.startswith("linux"):
        raise RuntimeError(_no_probe("cpu"))
    readings = [_ram_available(_MEMINFO), *cgroup_headrooms(_MEMBERSHIP, _CGROUP_MOUNT)]
    if _has_limited_addresses():
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(_STATM.read_bytes().split()[0])  # opened each time: it is that of the process that opened it
        readings.append(limit - pages * resource.getpagesize())
    return max(0, min(readings))


def _has_limited_addresses() -> bool:
    return resource is not None and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


class _KernelFile:
    """A file that the kernel writes whenever it is read; left open, since with "auto" calls read some of them often."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor, self._process = -1, -1

    def read(self) -> bytes:
        """What it says now."""
        process = os.getpid()
        if process != self._process:
            # A child opens its own: a daemon closes what it was born with, and the numbers are given out again.
            self._descriptor = os.open(self.path, os.O_RDONLY)
            self._process = process
        content = more = os.pread(self._descriptor, _READ_AT_ONCE, 0)  # short only at the end: it is one record
        while len(more) == _READ_AT_ONCE:
            more = os.pread(self._descriptor, _READ_AT_ONCE, len(content))
            content += more
        return content


_kernel_file = cache(_KernelFile)


def _ram_available(meminfo: Path) -> int:
    found = _MEM_AVAILABLE.search(_kernel_file(meminfo).read())
    if found is None:
        raise RuntimeError(_no_probe("cpu"))
    return int(found[1]) * 1024


def _macos_available() -> int:
    """Free, inactive, speculative and purgeable pages, as macOS's own `vm_stat` counts them."""
    text = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, check=True).stdout
    page = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text)
    if page is None or not pages:
        raise RuntimeError(_no_probe("cpu"))
    return int(page[1]) * sum(map(int, pages))


class _Cgroup(NamedTuple):
    """The files that tell a cgroup's memory, and what its cache that the kernel can drop is called."""

    limit: _KernelFile
    usage: _KernelFile
    stat: _KernelFile | None
    cache: bytes


def cgroup_headrooms(membership: Path, mount: Path) -> list[int]:
    """Bytes left under the memory limit of every cgroup v1 and v2 ancestor that has one.

    Args:
        membership: the process's list of cgroups, `/proc/self/cgroup`.
        mount: where cgroups are mounted, `/sys/fs/cgroup`.

    Page cache that the kernel can drop (`inactive_file`) counts as free.
    """
    headrooms: list[int] = []
    for group in _memory_cgroups(membership, mount):
        most = group.limit.read().strip()
        if most != b"max" and int(most) < _CGROUP_V1_UNLIMITED:
            used = int(group.usage.read()) - _cgroup_stat(group.stat, group.cache)
            headrooms.append(int(most) - used)
    return headrooms


@cache
def _memory_cgroups(membership: Path, mount: Path) -> tuple[_Cgroup, ...]:
    """The cgroups that account the process's memory; looked up once, as they stay while it runs."""
    if not membership.exists():
        return ()
    found: list[_Cgroup] = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # v2, at the mount itself or beside v1
            for root in (mount, mount / "unified"):
                found += _ancestors(root, path, "memory.max", "memory.current", b"inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            found += _ancestors(mount / "memory", path, *names, b"total_inactive_file")
    return tuple(found)


def _ancestors(root: Path, path: str, limit: str, usage: str, cache: bytes) -> list[_Cgroup]:
    """The group at `path` and those above it up to `root` that have a limit; a container sees only some of them."""
    group = root / path.lstrip("/")
    folders = [folder for folder in (group, *group.parents) if root in (folder, *folder.parents)]
    return [
        _Cgroup(
            _KernelFile(folder / limit),
            _KernelFile(folder / usage),
            _KernelFile(folder / "memory.stat") if (folder / "memory.stat").exists() else None,
            cache,
        )
        for folder in folders
        if (folder / limit).exists() and (folder / usage).exists()
    ]


def _cgroup_stat(stat: _KernelFile | None, key: bytes) -> int:
    if stat is None:
        return 0
    found = re.search(rb"^%s (\d+)$" % key, stat.read(), flags=re.MULTILINE)
    return int(found[1]) if found else 0
