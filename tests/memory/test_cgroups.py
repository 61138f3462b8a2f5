"""What control groups leave a process."""

from __future__ import annotations

from pathlib import Path

from slicemod.memory.cgroups import cgroup_headrooms

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
