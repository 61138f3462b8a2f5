"""What the control groups of Linux (cgroups), the memory limits of containers and services, leave to this process."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from slicemod.memory.kernel_file import KernelFile

# cgroup v1 writes "no limit" as the largest 63-bit number that is a multiple of the page size.
_CGROUP_V1_UNLIMITED = 1 << 62


class _Cgroup(NamedTuple):
    """The files with a cgroup's memory, and the name by which its `stat` file lists cache that the kernel can drop."""

    limit: KernelFile
    usage: KernelFile
    stat: KernelFile | None
    cache: bytes


def cgroup_headrooms(membership: Path, mount: Path) -> list[int]:
    """Bytes left below the memory limit of each cgroup, v1 or v2, that this process is in, ancestors included.

    Page cache that the kernel can drop (`inactive_file`) counts as free.

    Args:
        membership: the process's list of cgroups, `/proc/self/cgroup`.
        mount: where cgroups are mounted, `/sys/fs/cgroup`.
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
    """The cgroups that limit the process's memory. They are looked up once: they rarely change while it runs."""
    if not membership.exists():
        return ()
    found: list[_Cgroup] = []
    for line in membership.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # v2, mounted at the mount itself, or in "unified" beside v1
            for root in (mount, mount / "unified"):
                found += _ancestors(root, path, "memory.max", "memory.current", b"inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            found += _ancestors(mount / "memory", path, *names, b"total_inactive_file")
    return tuple(found)


def _ancestors(root: Path, path: str, limit: str, usage: str, cache: bytes) -> list[_Cgroup]:
    """The group at `path` and the groups above it, up to `root`, that have a limit and can be seen from a container."""
    group = root / path.lstrip("/")
    folders = [folder for folder in (group, *group.parents) if root in (folder, *folder.parents)]
    return [
        _Cgroup(
            KernelFile(folder / limit),
            KernelFile(folder / usage),
            KernelFile(folder / "memory.stat") if (folder / "memory.stat").exists() else None,
            cache,
        )
        for folder in folders
        if (folder / limit).exists() and (folder / usage).exists()
    ]


def _cgroup_stat(stat: KernelFile | None, key: bytes) -> int:
    if stat is None:
        return 0
    found = re.search(rb"^%s (\d+)$" % key, stat.read(), flags=re.MULTILINE)
    return int(found[1]) if found else 0
