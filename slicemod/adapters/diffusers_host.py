"""The attention layers of diffusers' models: which are swapped, and how."""

from __future__ import annotations

from typing import Any

from torch import nn

from slicemod.adapters.diffusers import SlicemodAttnProcessor
from slicemod.adapters.own_code import altered, methods_from, owner_of, replaced_method
from slicemod.config import SliceConfig
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

_PACKAGE = "diffusers.models.attention_processor"
_REPLACED = "_slicemod_replaced"  # the name under which a layer keeps the processor whose place ours took


class DiffusersHost:
    """`diffusers.models.attention_processor.Attention`, known by its name and its processor."""

    name = "diffusers"

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

    def attends(self, module: nn.Module) -> str:
        """The class of the layer's processor."""
        return type(_processor(module)).__name__

    def doubt(self, module: nn.Module) -> str | None:
        """That the layer is of another package, which has diffusers' layer within it or a class of the same name."""
        owner = type(module).__module__
        return None if owner == _PACKAGE else f"its class {owner}.Attention is not diffusers' own"

    def obstacle(self, parent: nn.Module, child: str) -> str | None:
        """A layer that somebody changed, or whose processor computes something else, is left alone."""
        module = parent.get_submodule(child)
        processor = type(_processor(module))
        has_added = getattr(module, "add_k_proj", None) is not None
        if processor is not SlicemodAttnProcessor:
            if processor.__name__ not in (_ADDED if has_added else _PLAIN + _FUSED + _IP_ADAPTER):
                more = " with added projections" if has_added else ""
                return f"its processor {processor.__name__} computes something else than plain attention{more}"
            if processor.__module__ not in (_PACKAGE, type(module).__module__):
                return f"its processor {processor.__module__}.{processor.__qualname__} is not diffusers' own"
        return _changed(module, processor) or _acts_within(module)

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

    def restore(self, parent: nn.Module, child: str) -> str | None:
        """Set the processor that was there before; whatever else was changed meanwhile stays."""
        module = parent.get_submodule(child)
        _processor(module).make_way(module)
        self.forget(module)
        return None

    def forget(self, module: nn.Module) -> bool:
        """The layer keeps what was replaced, whichever processor is set on it meanwhile."""
        return vars(module).pop(_REPLACED, None) is not None


def _processor(module: nn.Module) -> Any:
    return getattr(module, "processor", None)


def _changed(module: nn.Module, processor: type) -> str | None:
    """That somebody changed the processor's class, or a method of the layer that the processor calls."""
    replaced = replaced_method(processor, "__call__")
    if replaced is not None:
        return replaced
    call = vars(owner_of(processor, "__call__"))["__call__"].__code__
    called = [name for name, _ in methods_from(type(module), call, "__call__")]
    return altered(module, ["forward", *called[1:]])


def _acts_within(module: nn.Module) -> str | None:
    """That a hook of diffusers acts on the attention itself, as perturbed-attention guidance does.

    It takes the place of `F.scaled_dot_product_attention`, of which ours makes no use that it would see.
    """
    hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
    acting = [name for name, hook in hooks.items() if getattr(hook, "skip_attention_scores", False)]
    return (
        f"its hook {acting[0]} of diffusers skips the attention's scores, which a swap would undo" if acting else None
    )


HOSTS.append(DiffusersHost())
