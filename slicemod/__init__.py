"""slicemod: exact attention in slices that fit a memory budget, for latent-diffusion UNets.

The names are loaded when the first of them is asked for, so that `slicemod --help` need not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slicemod.adapters.diffusers_backend import register_diffusers_backend
    from slicemod.attention import MemoryAwareCrossAttention
    from slicemod.call import AttentionShape
    from slicemod.choose import Answer, plan_slices
    from slicemod.config import SliceConfig
    from slicemod.explained import explain
    from slicemod.functional import planned_attention, sliced_attention
    from slicemod.memory.free_memory import free_memory
    from slicemod.plan import NotEnoughMemoryError, SlicePlan
    from slicemod.planning.picture import plan_picture as plan_picture
    from slicemod.sdpa_mode import sliced_sdpa
    from slicemod.sdpa_report import SdpaReport
    from slicemod.swap import SwapReport, restore_attention, swap_attention, swap_vae

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AttentionShape",
    "MemoryAwareCrossAttention",
    "NotEnoughMemoryError",
    "SdpaReport",
    "SliceConfig",
    "SlicePlan",
    "SwapReport",
    "explain",
    "free_memory",
    "plan_slices",
    "planned_attention",
    "register_diffusers_backend",
    "restore_attention",
    "sliced_attention",
    "sliced_sdpa",
    "swap_attention",
    "swap_vae",
]


# Public too, but left out of `import *`, because it needs diffusers.
_PLANNING = {"plan_picture": "slicemod.planning.picture"}


def __getattr__(name: str) -> Any:
    """A public name, or a module of this package."""
    if name in _PLANNING:
        globals()[name] = getattr(import_module(_PLANNING[name]), name)
        return globals()[name]
    if name in __all__:
        public = import_module("slicemod.public")
        globals().update({public_name: getattr(public, public_name) for public_name in __all__})
        return globals()[name]
    if not name.startswith("_"):
        try:
            return import_module(f"slicemod.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"slicemod.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PLANNING})
