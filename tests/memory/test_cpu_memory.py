"""What a process can still allocate, by simulated answers of each system, and by this one's."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slicemod.memory import cpu_memory
from slicemod.memory.cpu_memory import linux_available
from slicemod.memory.free_memory import free_memory

MIB = 2**20


def test_this_machine_has_free_memory() -> None:
    assert free_memory("cpu") > MIB


@pytest.mark.parametrize(("headrooms", "free"), [([10**8, 10**10], 10**8), ([10**10], 10**9), ([-4096], 0)])
def test_free_is_the_smallest_reading_and_never_less_than_nothing(
    headrooms: list[int], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(cpu_memory, "linux_available", lambda meminfo: 10**9)
    monkeypatch.setattr(cpu_memory, "cgroup_headrooms", lambda membership, mount: headrooms)
    assert free_memory("cpu") == free


def test_available_ram_is_that_of_the_kernel(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable:    300 kB\n", encoding="utf-8")
    assert linux_available(meminfo) == 300 * 1024


def test_a_kernel_that_does_not_say_is_asked_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemFree: 100 kB\n", encoding="utf-8")
    assert linux_available(meminfo) is None
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(cpu_memory, "linux_available", lambda _: None)
    with pytest.raises(RuntimeError, match="Name a budget in bytes"):
        free_memory("cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is enforced on Linux only")
def test_a_limit_on_the_address_space_is_respected() -> None:
    program = """
import resource
from pathlib import Path
from slicemod import free_memory
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = taken + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(free_memory("cpu"))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 90 * MIB < int(ran.stdout) <= 100 * MIB


def test_macos_counts_the_pages_that_it_can_hand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                   11.
Pages active:                              97.
Pages inactive:                             13.
Pages speculative:                           17.
Pages wired down:                         89.
Pages purgeable:                              19.
"""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: SimpleNamespace(stdout=text))
    assert free_memory("cpu") == (11 + 13 + 17 + 19) * 16384


class Kernel32:
    """Windows' library, of a machine with these sizes in bytes; one without sizes fails the call."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def GlobalMemoryStatusEx(self, status: Any) -> int:  # noqa: N802 - Windows' name
        record = status._obj
        if record.dwLength != 64:  # Windows' own check, of what its headers say
            return 0
        for name, size in self.sizes.items():
            setattr(record, name, size)
        return bool(self.sizes)


def simulate_windows(monkeypatch: pytest.MonkeyPatch, kernel32: Kernel32) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", {"kernel32": kernel32}.__getitem__, raising=False)


@pytest.mark.parametrize(("ram", "commit", "free"), [(2**33, 2**34, 2**33), (2**34, 2**32, 2**32)])
def test_windows_gives_what_is_available_and_may_be_committed(
    ram: int, commit: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"ullTotalPhys": 2**36, "ullAvailPhys": ram, "ullTotalPageFile": 2**37, "ullAvailPageFile": commit}
    simulate_windows(monkeypatch, Kernel32(**sizes))
    assert free_memory("cpu") == free


def test_a_windows_that_does_not_say_asks_for_an_explicit_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_windows(monkeypatch, Kernel32())
    with pytest.raises(RuntimeError, match=r"'cpu' on win32.*Name a budget in bytes"):
        free_memory("cpu")


def test_a_system_without_a_probe_asks_for_an_explicit_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "freebsd14")
    with pytest.raises(RuntimeError, match=r"'cpu' on freebsd14.*Name a budget in bytes"):
        free_memory("cpu")
