"""The free memory of a GPU, or of another accelerator that PyTorch supports."""

from typing import Any

import torch


def free_accelerator_memory(device: torch.device) -> int | None:
    """Bytes that the driver has free, plus bytes that PyTorch's cache holds unused. None if PyTorch cannot tell.

    It calls `mem_get_info` and reads the allocator's statistics, which PyTorch has for CUDA, ROCm and XPU.
    """
    backend: Any = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info") or not hasattr(backend, "memory_stats_as_nested_dict"):
        return None
    # The nested form: PyTorch takes longer to flatten the statistics than for the rest of a call.
    stats = backend.memory_stats_as_nested_dict(device)
    cached = _current(stats, "reserved_bytes") - _current(stats, "active_bytes")
    return int(backend.mem_get_info(device)[0] + cached)


def _current(stats: dict[str, Any], name: str) -> int:
    return int(stats[name]["all"]["current"]) if name in stats else 0


def free_metal_memory() -> int:
    """Bytes of Metal's recommended working set that no tensor occupies; never less than 0.

    PyTorch's cache, which is `driver_allocated_memory - current_allocated_memory`, counts as free: PyTorch reuses it,
    and frees it before it runs out of memory.
    """
    return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
