"""CompVis LDM and its kin: CrossAttention modules become `MemoryAwareCrossAttention` with the same projections."""

from __future__ import annotations

import torch
from torch import nn

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.slice_config import SliceConfig
from slicemod.swap import HOSTS

_CLASSES = ("CrossAttention", "MemoryEfficientCrossAttention")
_ORIGINAL = "_slicemod_original"


class CompVisHost:
    """`CrossAttention` and `MemoryEfficientCrossAttention` of `ldm` and `sgm`, known by class name and parts."""

    name = "CompVis LDM"

    def recognises(self, module: nn.Module) -> bool:
        """A CrossAttention by name, with its projections."""
        if isinstance(module, MemoryAwareCrossAttention):
            return _ORIGINAL in module.__dict__
        parts = ("to_q", "to_k", "to_v", "to_out")
        return type(module).__name__ in _CLASSES and all(hasattr(module, part) for part in parts)

    def obstacle(self, module: nn.Module) -> str | None:
        """All of its layers can be swapped."""
        return None

    def swap(self, parent: nn.Module, child: str, slicing: SliceConfig) -> MemoryAwareCrossAttention:
        """Put a module with the same projections, hooks and modes in the layer's place."""
        module = parent.get_submodule(child)
        if isinstance(module, MemoryAwareCrossAttention):
            module.slicing = slicing
            return module
        swapped = _with_parts_of(module, slicing)
        setattr(parent, child, swapped)
        return swapped

    def restore(self, parent: nn.Module, child: str) -> bool:
        """Put the layer itself back."""
        module = parent.get_submodule(child)
        if not isinstance(module, MemoryAwareCrossAttention):
            return False
        original: nn.Module = module.__dict__[_ORIGINAL]
        original.training = module.training
        setattr(parent, child, original)
        return True


def _with_parts_of(module: nn.Module, slicing: SliceConfig) -> MemoryAwareCrossAttention:
    heads = int(vars(module)["heads"])
    to_q, to_k = module.get_submodule("to_q"), module.get_submodule("to_k")
    if not isinstance(to_q, nn.Linear) or not isinstance(to_k, nn.Linear):
        raise TypeError(
            f"{type(module).__name__}: expected to_q and to_k to be nn.Linear; got {type(to_q).__name__} and "
            f"{type(to_k).__name__}. Swap the attention before its projections are replaced."
        )
    with torch.device("meta"):  # its own projections are never used
        swapped = MemoryAwareCrossAttention(
            to_q.in_features, to_k.in_features, heads, to_q.out_features // heads, slicing=slicing
        )
    for part in ("to_q", "to_k", "to_v", "to_out"):
        setattr(swapped, part, module.get_submodule(part))
    swapped.training = module.training
    hooks = [name for name in vars(swapped) if "_hooks" in name]
    swapped.__dict__.update({name: vars(module)[name] for name in hooks})
    # Not through setattr: as a registered child it would double the keys of the state dict.
    swapped.__dict__[_ORIGINAL] = module
    return swapped


HOSTS.append(CompVisHost())
