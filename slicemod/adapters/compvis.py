"""CompVis LDM and its kin: CrossAttention modules become `MemoryAwareCrossAttention` with the same projections."""

from __future__ import annotations

import torch
from torch import nn

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.slice_config import SliceConfig
from slicemod.swap import HOSTS

_CLASSES = ("CrossAttention", "MemoryEfficientCrossAttention")
_PARTS = ("to_q", "to_k", "to_v", "to_out")
_ORIGINAL = "_slicemod_original"


class CompVisHost:
    """`CrossAttention` and `MemoryEfficientCrossAttention` of `ldm` and `sgm`, known by class name and parts."""

    name = "CompVis LDM"

    def recognises(self, module: nn.Module) -> bool:
        """A CrossAttention by name, with its projections."""
        if isinstance(module, MemoryAwareCrossAttention):
            return _ORIGINAL in module.__dict__
        return type(module).__name__ in _CLASSES and all(hasattr(module, part) for part in _PARTS)

    def obstacle(self, module: nn.Module) -> str | None:
        """A layer that holds more than the four projections computes something else, and is left alone."""
        if isinstance(module, MemoryAwareCrossAttention):
            return None
        more = [name for name, _ in module.named_children() if name not in _PARTS]
        more += [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        if more:
            return f"it holds {', '.join(more)} besides {', '.join(_PARTS)}"
        for part in ("to_q", "to_k", "to_v"):
            kind = type(module.get_submodule(part))
            if kind is not nn.Linear:
                return f"its {part} is a {kind.__name__}, not nn.Linear"
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
        raise TypeError(f"{type(module).__name__}: expected to_q and to_k to be nn.Linear, as `obstacle` asks for.")
    with torch.device("meta"):  # its own projections are never used
        swapped = MemoryAwareCrossAttention(
            to_q.in_features, to_k.in_features, heads, to_q.out_features // heads, slicing=slicing
        )
    swapped.scale = float(vars(module).get("scale", swapped.scale))
    for part in _PARTS:
        setattr(swapped, part, module.get_submodule(part))
    swapped.training = module.training
    hooks = [name for name in vars(swapped) if "_hooks" in name]
    swapped.__dict__.update({name: vars(module)[name] for name in hooks})
    # Not through setattr: as a registered child it would double the keys of the state dict.
    swapped.__dict__[_ORIGINAL] = module
    return swapped


HOSTS.append(CompVisHost())
