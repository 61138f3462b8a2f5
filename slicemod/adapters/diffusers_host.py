"""The attention layers of diffusers' models: which are swapped, and how."""

from __future__ import annotations

from typing import Any

from torch import nn

from slicemod.adapters.diffusers import SlicemodAttnProcessor
from slicemod.slice_config import SliceConfig
from slicemod.swap import HOSTS

# The processors whose attention SlicemodAttnProcessor computes: plain, of a layer with added projections, of one with
# fused projections, IP-Adapter's.
_PLAIN = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
_ADDED = (
    "AttnAddedKVProcessor",
    "AttnAddedKVProcessor2_0",
    "SlicedAttnAddedKVProcessor",
    "XFormersAttnAddedKVProcessor",
)
_FUSED = ("FusedAttnProcessor2_0",)
_IP_ADAPTER = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")

_REPLACED = "_slicemod_replaced"  # the name under which a layer keeps the processor whose place ours took


class DiffusersHost:
    """`diffusers.models.attention_processor.Attention`, known by its name and its processor."""

    name = "diffusers"
    guessed = False

    def recognises(self, module: nn.Module) -> bool:
        """An Attention with a processor."""
        return type(module).__name__ == "Attention" and hasattr(module, "set_processor")

    def holder(self, module: nn.Module) -> SlicemodAttnProcessor | None:
        """The layer's processor where it is one of ours that took another's place."""
        processor = _processor(module)
        if not isinstance(processor, SlicemodAttnProcessor):
            return None
        # To load or unload an IP-Adapter diffusers makes processors anew, by their class alone.
        if processor.replaced is None:
            processor.replaced = vars(module).get(_REPLACED)
        return None if processor.replaced is None else processor

    def replaced(self, module: nn.Module) -> str:
        """The former processor's class, which is all that an IP-Adapter's has changed."""
        replaced = _processor(module).replaced
        return (replaced if isinstance(replaced, type) else type(replaced)).__name__

    def obstacle(self, module: nn.Module) -> str | None:
        """A processor that computes something else is left alone."""
        processor = type(_processor(module)).__name__
        has_added = getattr(module, "add_k_proj", None) is not None
        if processor in (SlicemodAttnProcessor.__name__, *(_ADDED if has_added else _PLAIN + _FUSED + _IP_ADAPTER)):
            return None
        more = " with added projections" if has_added else ""
        return f"its processor {processor} computes something else than plain attention{more}"

    def swap(self, parent: nn.Module, child: str, slicing: SliceConfig) -> SlicemodAttnProcessor:
        """Set a `SlicemodAttnProcessor` on the layer; an IP-Adapter's, which has weights, becomes one."""
        module: Any = parent.get_submodule(child)
        replaced = _processor(module)
        if type(replaced).__name__ in _IP_ADAPTER:
            from slicemod.adapters.ip_adapter import slice_ip_adapter

            return slice_ip_adapter(replaced, slicing)
        processor = SlicemodAttnProcessor(slicing, fused_projections=type(replaced).__name__ in _FUSED)
        processor.replaced = replaced
        module.set_processor(processor)
        vars(module)[_REPLACED] = replaced  # not through setattr, which would register a module
        return processor

    def restore(self, parent: nn.Module, child: str) -> None:
        """Set the processor that was there before."""
        module = parent.get_submodule(child)
        _processor(module).make_way(module)
        vars(module).pop(_REPLACED, None)


def _processor(module: nn.Module) -> Any:
    return getattr(module, "processor", None)


HOSTS.append(DiffusersHost())
