"""Budgets in bytes, and what each kind of device has free."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slicemod import budget as memory
from slicemod.budget import budget_bytes, cgroup_headrooms, free_memory, parse_budget, surely_allows

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, 1),
        (536870912, 536870912),
        ("7", 7),
        ("512MiB", 512 * MIB),
        ("512 MiB", 512 * MIB),
        (" 2GB ", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("0.5KiB", 512),
        ("3B", 3),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("64KB", 64000),
        ("5MB", 5_000_000),
        (0.25, 250),
        (1.0, 1000),
        ("auto", 1000),
    ],
)
def test_accepted_budgets(budget: object, expected: int) -> None:
    assert parse_budget(budget, available=1000) == expected


@pytest.mark.parametrize(
    "budget",
    [
        0,
        -1,
        0.0,
        -0.5,
        1.5,
        math.nan,
        math.inf,
        True,
        False,
        None,
        [],
        "",
        "0",
        "0MiB",
        "-1MiB",
        "2.5",
        "1.5.1GiB",
        "12 furlongs",
        "2gb",
        "2Gb",
        "1EiB",
        "MiB",
        "1e9",
        "50%",
        "Auto",
        "0.1B",
    ],
)
def test_refused_budgets_are_quoted_beside_what_is_accepted(budget: object) -> None:
    with pytest.raises(ValueError) as caught:
        parse_budget(budget)
    assert "budget: expected" in str(caught.value)
    assert repr(budget) in str(caught.value)
    assert '"512MiB"' in str(caught.value)


@given(st.integers(1, 2**50))
def test_any_positive_number_of_bytes_means_itself(size: int) -> None:
    assert parse_budget(size) == parse_budget(f"{size}B") == size


def test_a_fraction_stays_one_until_the_free_bytes_are_known() -> None:
    assert parse_budget(0.25) == 0.25
    assert parse_budget("auto") == 1.0


def test_a_budget_in_bytes_does_not_look_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(device: object) -> int:
        raise AssertionError(f"asked {device}")

    monkeypatch.setattr(memory, "free_memory", probe)
    assert budget_bytes("2KiB", torch.device("cpu")) == 2048


def test_a_fraction_is_one_of_the_free_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1003)
    assert budget_bytes(0.5, torch.device("cpu")) == 501
    assert budget_bytes("auto", torch.device("cpu")) == 1003


# Control groups, laid out in a folder as Linux lays them out under /sys/fs/cgroup.


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def headrooms(tmp_path: Path, membership: str) -> list[int]:
    (tmp_path / "membership").write_text(membership)
    return sorted(cgroup_headrooms(tmp_path / "membership", tmp_path / "cgroup"))


def test_every_cgroup_v2_ancestor_with_a_limit_counts(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root, memory__current="999")  # the root has no limit
    write(root / "pod", memory__max="1000", memory__current="300", memory__stat="anon 5\ninactive_file 20")
    write(root / "pod" / "unlimited", memory__max="max", memory__current="300")
    write(root / "pod" / "unlimited" / "box", memory__max="900", memory__current="100")
    assert headrooms(tmp_path, "0::/pod/unlimited/box\n") == [1000 - (300 - 20), 900 - 100]


def test_cgroup_v2_counts_no_other_page_cache_as_free(tmp_path: Path) -> None:
    stat = "active_file 400\ninactive_file 7\nworkingset_inactive_file 9"
    write(tmp_path / "cgroup" / "box", memory__max="1000", memory__current="500", memory__stat=stat)
    assert headrooms(tmp_path, "0::/box\n") == [507]


def test_a_long_file_is_read_to_its_end(tmp_path: Path) -> None:
    stat = "\n".join(f"numa_{node} 1" for node in range(20_000)) + "\ninactive_file 7"
    write(tmp_path / "cgroup" / "box", memory__max="1000", memory__current="500", memory__stat=stat)
    assert headrooms(tmp_path, "0::/box\n") == [507]


def test_cgroup_v1_reads_the_memory_controller(tmp_path: Path) -> None:
    root = tmp_path / "cgroup" / "memory"
    unlimited = str(2**63 - 4096)
    write(root, memory__limit_in_bytes=unlimited, memory__usage_in_bytes="5000")
    write(
        root / "docker" / "box",
        memory__limit_in_bytes="2000",
        memory__usage_in_bytes="700",
        memory__stat="cache 90\ninactive_file 1\ntotal_inactive_file 50",
    )
    membership = "12:cpu,cpuacct:/docker/box\n11:rdma,memory:/docker/box\n1:name=systemd:/docker/box\n"
    assert headrooms(tmp_path, membership) == [1350]


def test_a_hybrid_system_counts_both_versions(tmp_path: Path) -> None:
    write(tmp_path / "cgroup" / "new", memory__max="100", memory__current="1")
    write(tmp_path / "cgroup" / "memory" / "old", memory__limit_in_bytes="200", memory__usage_in_bytes="2")
    assert headrooms(tmp_path, "1:memory:/old\n0::/new\n") == [99, 198]


def test_a_cgroup_inside_a_container_may_have_its_files_at_the_mount(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", memory__max="500", memory__current="100")
    assert headrooms(tmp_path, "0::/a/path/of/the/host\n") == [400]


def test_a_system_without_cgroups_has_no_limits_by_them(tmp_path: Path) -> None:
    assert cgroup_headrooms(tmp_path / "absent", tmp_path) == []


def test_a_limit_that_changes_is_seen_at_the_next_reading(tmp_path: Path) -> None:
    box = tmp_path / "cgroup" / "box"
    write(box, memory__max="1000", memory__current="500")
    assert headrooms(tmp_path, "0::/box\n") == [500]
    write(box, memory__max="700", memory__current="600", memory__stat="inactive_file 5")
    assert headrooms(tmp_path, "0::/box\n") == [100]
    write(box, memory__max="max")
    assert headrooms(tmp_path, "0::/box\n") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_closes_all_files_reads_the_right_ones(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 300 kB\n")
    (tmp_path / "other").write_text("MemAvailable: 7 kB\n")
    program = """
import os, sys
from pathlib import Path
from slicemod.budget import _ram_available
meminfo, other = map(Path, sys.argv[1:])
_ram_available(meminfo)
if os.fork() == 0:
    os.closerange(3, 100)
    for _ in range(50):
        os.open(other, os.O_RDONLY)
    os._exit(_ram_available(meminfo) != 300 * 1024)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    subprocess.run([sys.executable, "-c", program, tmp_path / "meminfo", tmp_path / "other"], check=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds: the last of these. The CPU has 4 GiB free."""
    times = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[-1])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory, "_ram_available", lambda meminfo: 4 * 2**30)
    monkeypatch.setattr(memory, "cgroup_headrooms", lambda membership, mount: [])
    monkeypatch.setattr(memory, "_last_readings", {})
    return times


def test_nothing_is_sure_before_the_device_was_looked_at(clock: list[float]) -> None:
    assert not surely_allows(1.0, 1, CPU)


def test_a_reading_is_trusted_for_less_than_it_said_and_not_for_long(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    free_memory("cpu")
    clock.append(100 + 2**-10)  # in which 1 GiB may be written
    assert surely_allows(1.0, 3 * 2**30, CPU)
    assert not surely_allows(1.0, 3 * 2**30 + 1, CPU)
    assert surely_allows(0.5, 3 * 2**29, CPU)
    assert not surely_allows(0.5, 3 * 2**29 + 1, CPU)
    clock.append(100 + 2**-8)  # in which all of it may be
    assert not surely_allows(1.0, 1, CPU)
    monkeypatch.setattr(memory, "_ram_available", lambda meminfo: 2**50)
    free_memory("cpu")
    clock.append(clock[-1] + 0.009)
    assert surely_allows(1.0, 2**49, CPU)
    clock.append(clock[-1] + 0.002)
    assert not surely_allows(1.0, 1, CPU)


def test_a_reading_says_nothing_of_other_devices_or_of_a_simulated_one(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    free_memory("cpu")
    assert not surely_allows(1.0, 1, torch.device("cuda"))
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**40)
    assert not surely_allows(1.0, 1, CPU)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is enforced on Linux only")
def test_where_the_address_space_is_limited_no_reading_is_trusted(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    free_memory("cpu")
    assert surely_allows(1.0, 1, CPU)
    monkeypatch.setattr("resource.getrlimit", lambda which: (2**40, 2**40))
    assert not surely_allows(1.0, 1, CPU)


def test_a_recent_reading_of_a_gpu_is_trusted_for_a_small_share_of_it(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 9 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: {})
    free_memory(device)
    clock.append(100.009)
    assert surely_allows(1.0, 3 * 2**26, device)
    assert not surely_allows(1.0, 3 * 2**26 + 1, device)
    assert not surely_allows(0.5, 3 * 2**26, device)
    assert not surely_allows(1.0, 1, torch.device("cuda", 0))
    clock.append(100.011)
    assert not surely_allows(1.0, 1, device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_budget_in_bytes_is_sure_on_any_device(device: str) -> None:
    assert surely_allows(100, 100, torch.device(device))
    assert not surely_allows(100, 101, torch.device(device))


def test_free_cpu_memory_is_the_smallest_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory, "_ram_available", lambda meminfo: 10**9)
    monkeypatch.setattr(memory, "cgroup_headrooms", lambda membership, mount: [10**8, 10**10])
    assert free_memory("cpu") == 10**8


def test_a_group_over_its_limit_leaves_nothing_rather_than_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory, "_ram_available", lambda meminfo: 10**9)
    monkeypatch.setattr(memory, "cgroup_headrooms", lambda membership, mount: [-4096])
    assert free_memory("cpu") == 0


def test_available_ram_is_that_of_the_kernel(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable:    300 kB\n")
    assert memory._ram_available(meminfo) == 300 * 1024


def test_available_ram_of_a_kernel_that_does_not_say_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemFree: 100 kB\n")
    with pytest.raises(RuntimeError, match="Name a budget in bytes"):
        memory._ram_available(tmp_path / "meminfo")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is enforced on Linux only")
def test_a_limit_on_the_address_space_is_respected() -> None:
    program = """
import resource
from pathlib import Path
from slicemod.budget import free_memory
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = taken + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(free_memory("cpu"))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 90 * MIB < int(ran.stdout) <= 100 * MIB


def test_this_machine_has_free_memory() -> None:
    assert free_memory("cpu") > MIB


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


@pytest.mark.parametrize("device_type", ["cuda", "xpu"])
def test_an_accelerator_adds_what_its_cache_holds_unused(device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 1000, 9000

    def memory_stats(device: torch.device) -> dict[str, Any]:
        asked.append(device)
        return {"reserved_bytes": {"all": {"current": 500}}, "active_bytes": {"all": {"current": 200}}, "segment": {}}

    backend = getattr(torch, device_type)
    monkeypatch.setattr(backend, "mem_get_info", mem_get_info, raising=False)
    monkeypatch.setattr(backend, "memory_stats_as_nested_dict", memory_stats, raising=False)
    assert free_memory(f"{device_type}:1") == 1000 + (500 - 200)
    assert asked == [torch.device(device_type, 1)] * 2


def test_an_accelerator_that_has_allocated_nothing_has_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: {})
    assert free_memory("cuda") == 1000


@pytest.mark.parametrize(("allocated", "expected"), [(300, 700), (1200, 0)])
def test_metal_has_its_working_set_less_what_is_allocated(
    allocated: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: allocated)
    assert free_memory("mps") == expected


def test_a_device_without_a_probe_asks_for_an_explicit_budget() -> None:
    with pytest.raises(RuntimeError, match=r"'meta'.*SliceConfig\(budget="):
        free_memory("meta")


def test_a_cpu_without_a_probe_asks_for_an_explicit_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RuntimeError, match=r"'cpu' on win32.*Name a budget in bytes"):
        free_memory("cpu")


@pytest.mark.cuda
def test_a_real_cuda_device_says_what_it_has_free() -> None:
    def fallen() -> int:
        before = free_memory("cuda")
        held = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
        return before - free_memory("cuda") - held.numel()

    torch.cuda.empty_cache()
    assert any(fallen() >= 0 for _ in range(5))  # other processes may free memory meanwhile
