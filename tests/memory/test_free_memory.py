"""Probes: what they remember of their answers, and for how long it is relied upon."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch

from slicemod.memory.free_memory import (
    PROBES,
    MemoryProbe,
    free_memory,
    left_of_accelerator_memory,
    left_of_cpu_memory,
    surely_free,
)

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds: the last of these."""
    times = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[-1])
    return times


def test_a_probe_that_promises_nothing_is_relied_upon_for_nothing(free_bytes: list[int]) -> None:
    assert free_memory("cpu") == free_bytes[-1]
    assert surely_free(CPU) == 0


def test_nothing_is_sure_before_a_device_was_looked_at() -> None:
    assert MemoryProbe(lambda device: 7 * GIB, left_of_cpu_memory).surely_free(CPU) == 0


def test_an_answer_is_remembered_for_its_own_device(clock: list[float]) -> None:
    sizes = {0: 11, 1: 13}
    probe = MemoryProbe(lambda device: sizes[device.index], lambda free, age: free - age)
    assert [probe.free(torch.device("cuda", index)) for index in (0, 1)] == [11, 13]
    clock.append(102.0)
    sizes[0] = 5
    assert [probe.surely_free(torch.device("cuda", index)) for index in (0, 1)] == [11 - 2, 13 - 2]
    assert probe.free(torch.device("cuda", 0)) == 5
    assert probe.surely_free(torch.device("cuda", 0)) == 5


def test_the_age_counts_from_before_the_reading(clock: list[float]) -> None:
    def read(device: torch.device) -> int:
        clock.append(clock[-1] + 3.0)
        return 17

    probe = MemoryProbe(read, lambda free, age: free - age)
    probe.free(CPU)
    assert probe.surely_free(CPU) == 17 - 3


def test_another_probe_knows_nothing_of_the_answers_of_the_former(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(lambda device: 7, lambda free, age: free))
    free_memory("cpu")
    assert surely_free(CPU) == 7
    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(lambda device: 5, lambda free, age: free))
    assert surely_free(CPU) == 0


def test_a_backend_of_its_own_can_have_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBES, "meta", MemoryProbe(lambda device: 19))
    assert free_memory("meta") == 19


def test_of_a_cpus_memory_goes_what_its_cores_could_have_written() -> None:
    rate = min((os.cpu_count() or 16) * 64, 1024) * GIB
    assert left_of_cpu_memory(4 * GIB, GIB / rate) == 3 * GIB
    assert left_of_cpu_memory(4 * GIB, 5 * GIB / rate) == 0


def test_no_answer_of_a_cpu_lasts_longer_than_a_tenth_of_a_second() -> None:
    assert left_of_cpu_memory(2**50, 0.09) > 2**49
    assert left_of_cpu_memory(2**50, 0.11) == 0


def test_what_windows_commits_is_not_relied_upon_for_longer_than_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert left_of_cpu_memory(2**50, 0.009) > 2**49
    assert left_of_cpu_memory(2**50, 0.011) == 0


def test_where_the_address_space_is_limited_no_answer_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    assert left_of_cpu_memory(4 * GIB, 0.0) == 4 * GIB
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**40, 2**40))
    assert left_of_cpu_memory(4 * GIB, 0.0) == 0


def test_a_sixteenth_of_an_accelerators_memory_lasts_for_a_hundredth_of_a_second() -> None:
    assert left_of_accelerator_memory(3 * GIB, 0.009) == 3 * 2**26
    assert left_of_accelerator_memory(3 * GIB, 0.011) == 0


@pytest.mark.parametrize("device_type", ["cuda", "xpu", "mps"])
def test_every_accelerators_answers_last(device_type: str, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = getattr(torch, device_type)
    if device_type == "mps":
        monkeypatch.setattr(backend, "recommended_max_memory", lambda: 3 * GIB)
        monkeypatch.setattr(backend, "current_allocated_memory", lambda: 0)
    else:
        monkeypatch.setattr(backend, "mem_get_info", lambda device: (3 * GIB, 9 * GIB), raising=False)
        monkeypatch.setattr(backend, "memory_stats_as_nested_dict", lambda device: {}, raising=False)
    device = torch.device(device_type, 0)
    free_memory(device)
    clock.append(100.009)
    assert surely_free(device) == 3 * 2**26
    clock.append(100.011)
    assert surely_free(device) == 0
