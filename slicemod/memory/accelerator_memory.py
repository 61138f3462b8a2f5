"""What a GPU, or another accelerator of PyTorch's, has free."""

from typing import Any

import torch


def free_accelerator_memory(device: torch.device) -> int | None:
    """Bytes that the driver has free, and those that PyTorch's cache holds unused; None where PyTorch tells neither.

    It asks `mem_get_info` and the allocator's statistics, which CUDA, ROCm and XPU have.
    """
    backend: Any = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info") or not hasattr(backend, "memory_stats_as_nested_dict"):
        return None
    # Nested as it comes; to sort it flat takes PyTorch longer than the rest of a call.
    stats = backend.memory_stats_as_nested_dict(device)
    cached = _current(stats, "reserved_bytes") - _current(stats, "active_bytes")
    return int(backend.mem_get_info(device)[0] + cached)


def _current(stats: dict[str, Any], name: str) -> int:
    return int(stats[name]["all"]["current"]) if name in stats else 0


def free_metal_memory() -> int:
    """Bytes of Metal's recommended working set that no tensor occupies; never less than 0.

    What the driver has allocated beyond the tensors (`driver_allocated_memory - current_allocated_memory`) is PyTorch's
    cache, which it reuses, or frees before it runs out. So that counts as free.
    """
    return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
