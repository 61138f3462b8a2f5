"""What accelerators have free, by simulated readings, and by those of a CUDA device where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicemod.memory.free_memory import free_memory

MIB = 2**20


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


@pytest.mark.parametrize(("in_tensors", "cached", "expected"), [(300, 0, 700), (300, 500, 700), (1200, 0, 0)])
def test_metal_has_its_working_set_less_what_tensors_occupy_whatever_is_cached(
    in_tensors: int, cached: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1000)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: in_tensors)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: in_tensors + cached)
    assert free_memory("mps") == expected


def test_a_device_that_does_not_say_asks_for_an_explicit_budget() -> None:
    with pytest.raises(RuntimeError, match=r"'meta'.*SliceConfig\(budget="):
        free_memory("meta")


@pytest.mark.cuda
def test_a_real_cuda_device_says_what_it_has_free() -> None:
    def fallen() -> int:
        before = free_memory("cuda")
        held = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
        return before - free_memory("cuda") - held.numel()

    torch.cuda.empty_cache()
    assert any(fallen() >= 0 for _ in range(5))  # other processes may free memory meanwhile
