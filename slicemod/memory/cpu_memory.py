"""How much memory this process can still allocate, according to the operating system."""

import ctypes
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from slicemod.memory.cgroups import cgroup_headrooms
from slicemod.memory.kernel_file import KernelFile

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]

_MEMINFO, _STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
_MEMBERSHIP, _CGROUP_MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_MEM_AVAILABLE = re.compile(rb"^MemAvailable: *(\d+) kB$", flags=re.MULTILINE)


def free_cpu_memory() -> int | None:
    """Bytes that the process can still allocate, never less than 0. None if the system does not say.

    Linux: the smallest of the available RAM, what is left below the limit of each cgroup (v1 and v2) that the process
    is in, and what is left below `RLIMIT_AS`. macOS: the pages that the system can hand out. Windows: the available
    RAM, or what the system still commits if that is less; the page file bounds it.
    """
    if sys.platform == "darwin":
        return macos_available()
    if sys.platform == "win32":
        return windows_available(ctypes.WinDLL("kernel32"))
    if not sys.platform.startswith("linux"):
        return None
    available = linux_available(_MEMINFO)
    if available is None:
        return None
    readings = [available, *cgroup_headrooms(_MEMBERSHIP, _CGROUP_MOUNT)]
    if has_limited_addresses():
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(_STATM.read_bytes().split()[0])  # opened each time: after a fork an open one is the parent's
        readings.append(limit - pages * resource.getpagesize())
    return max(0, min(readings))


def has_limited_addresses() -> bool:
    """Whether the process's address space is limited (`ulimit -v`)."""
    return resource is not None and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


_kernel_file = cache(KernelFile)


def linux_available(meminfo: Path) -> int | None:
    """Available RAM in bytes, as the kernel estimates it; None for a kernel before 3.14, which does not say.

    Args:
        meminfo: `/proc/meminfo`.
    """
    found = _MEM_AVAILABLE.search(_kernel_file(meminfo).read())
    return None if found is None else int(found[1]) * 1024


def macos_available() -> int | None:
    """Bytes of free, inactive, speculative and purgeable pages, as the command `vm_stat` of macOS counts them."""
    text = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, encoding="utf-8", check=True).stdout
    page = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text)
    return int(page[1]) * sum(map(int, pages)) if page is not None and pages else None


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX; sizes are in bytes."""

    _fields_ = [
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("ullTotalPageFile", ctypes.c_uint64),
        ("ullAvailPageFile", ctypes.c_uint64),
        ("ullTotalVirtual", ctypes.c_uint64),
        ("ullAvailVirtual", ctypes.c_uint64),
        ("ullAvailExtendedVirtual", ctypes.c_uint64),
    ]


def windows_available(kernel32: Any) -> int | None:
    """Bytes of available RAM, or bytes that Windows still commits if that is less. None if the call fails.

    Windows promises memory when it is allocated, not when it is first written to. So an allocation beyond what it still
    commits fails, however much RAM is free.

    Args:
        kernel32: the Windows library with this name.
    """
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    if not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return min(int(status.ullAvailPhys), int(status.ullAvailPageFile))
