"""The public names, which `slicemod` shows as its own."""

from slicemod.adapters import attn_block, compvis, diffusers_host, lookalikes  # noqa: F401 - slicemod.adapters.compvis
from slicemod.attention import MemoryAwareCrossAttention
from slicemod.memory.free_memory import free_memory
from slicemod.plan import NotEnoughMemoryError, SlicePlan, plan_slices
from slicemod.shapes import AttentionShape
from slicemod.slice_config import SliceConfig
from slicemod.sliced import sliced_attention
from slicemod.swap import SwapReport, restore_attention, swap_attention

__all__ = [
    "AttentionShape",
    "MemoryAwareCrossAttention",
    "NotEnoughMemoryError",
    "SliceConfig",
    "SlicePlan",
    "SwapReport",
    "free_memory",
    "plan_slices",
    "restore_attention",
    "sliced_attention",
    "swap_attention",
]
