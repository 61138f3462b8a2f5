"""The public names, which `slicemod` shows as its own."""

from slicemod.adapters.diffusers_backend import register_diffusers_backend
from slicemod.attention import MemoryAwareCrossAttention
from slicemod.call import AttentionShape
from slicemod.choose import Answer, plan_slices
from slicemod.config import SliceConfig
from slicemod.explained import explain
from slicemod.functional import planned_attention, sliced_attention
from slicemod.memory.free_memory import free_memory
from slicemod.on_cpu.prepare import PreparedForCpu, prepare_for_cpu
from slicemod.plan import NotEnoughMemoryError, SlicePlan
from slicemod.sdpa_mode import sliced_sdpa
from slicemod.sdpa_report import SdpaReport
from slicemod.swap import SwapReport, restore_attention, swap_attention, swap_vae

__all__ = [
    "Answer",
    "AttentionShape",
    "MemoryAwareCrossAttention",
    "NotEnoughMemoryError",
    "PreparedForCpu",
    "SdpaReport",
    "SliceConfig",
    "SlicePlan",
    "SwapReport",
    "explain",
    "free_memory",
    "prepare_for_cpu",
    "plan_slices",
    "planned_attention",
    "register_diffusers_backend",
    "restore_attention",
    "sliced_attention",
    "sliced_sdpa",
    "swap_attention",
    "swap_vae",
]
