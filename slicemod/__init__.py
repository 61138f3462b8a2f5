"""slicemod: exact attention in slices that fit a memory budget, for latent-diffusion UNets.

The names are loaded when the first of them is asked for, so that `slicemod --help` need not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slicemod.attention import MemoryAwareCrossAttention
    from slicemod.memory.free_memory import free_memory
    from slicemod.plan import NotEnoughMemoryError, SlicePlan, plan_slices
    from slicemod.shapes import AttentionShape
    from slicemod.slice_config import SliceConfig
    from slicemod.sliced import sliced_attention
    from slicemod.swap import SwapReport, restore_attention, swap_attention

__version__ = "0.1.0"

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


def __getattr__(name: str) -> Any:
    """A public name, or a module of those that have one."""
    if not name.startswith("_"):
        public = import_module("slicemod.public")
        globals().update({public_name: getattr(public, public_name) for public_name in __all__})
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
