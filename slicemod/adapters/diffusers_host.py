"""The attention layers of diffusers' models: which are swapped, and how."""

from __future__ import annotations

from typing import Any

from torch import nn

from slicemod.adapters.diffusers import SlicemodAttnProcessor
from slicemod.adapters.own_code import altered, methods_from, owner_of, replaced_method
from slicemod.config import SliceConfig
from slicemod.swap import HOSTS

# The processors that SlicemodAttnProcessor can replace: plain ones, those of layers with added projections, those of
# layers with fused projections, and IP-Adapter's.
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
_REPLACED = "_slicemod_replaced"  # the attribute in which a layer keeps its replaced processor


class DiffusersHost:
    """`diffusers.models.attention_processor.Attention`, which is known by its name and its processor."""

    name = "diffusers"
    role = "attention"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module is called Attention and has a processor."""
        return type(module).__name__ == "Attention" and hasattr(module, "set_processor")

    def holder(self, module: nn.Module) -> SlicemodAttnProcessor | None:
        """The layer's processor, if it is one of slicemod's that replaced another one."""
        processor = _processor(module)
        if not isinstance(processor, SlicemodAttnProcessor):
            return None
        # When it loads or unloads an IP-Adapter, diffusers makes new processors of the same class, without our
        # attribute.
        if processor.replaced is None:
            processor.replaced = vars(module).get(_REPLACED)
        return None if processor.replaced is None else processor

    def replaced(self, module: nn.Module) -> str:
        """The class of the former processor. For an IP-Adapter it is its former class, because the object stays."""
        replaced = _processor(module).replaced
        return (replaced if isinstance(replaced, type) else type(replaced)).__name__

    def attends(self, module: nn.Module) -> str:
        """The class of the layer's processor."""
        return type(_processor(module)).__name__

    def doubt(self, module: nn.Module) -> str | None:
        """That the layer's class is from another package than diffusers."""
        owner = type(module).__module__
        return None if owner == _PACKAGE else f"its class {owner}.Attention is not diffusers' own"

    def obstacle(self, parent: nn.Module, child: str) -> str | None:
        """That somebody changed the layer, or that its processor computes something else than plain attention."""
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
        """Set a `SlicemodAttnProcessor`. An IP-Adapter's processor has weights, so it stays and changes its class."""
        module: Any = parent.get_submodule(child)
        replaced = _processor(module)
        if type(replaced).__name__ in _IP_ADAPTER:
            from slicemod.adapters.ip_adapter import slice_ip_adapter

            return slice_ip_adapter(replaced, slicing)
        processor = SlicemodAttnProcessor(slicing, fused_projections=type(replaced).__name__ in _FUSED)
        processor.replaced = replaced
        module.set_processor(processor)
        vars(module)[_REPLACED] = replaced  # setattr would register the processor if it is a module
        return processor

    def restore(self, parent: nn.Module, child: str) -> str | None:
        """Set the former processor. Everything else that was changed meanwhile stays."""
        module = parent.get_submodule(child)
        _processor(module).make_way(module)
        self.forget(module)
        return None

    def forget(self, module: nn.Module) -> bool:
        """Remove the replaced processor that the layer keeps, whichever processor was set on it meanwhile."""
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
    """That a hook of diffusers changes the attention itself, as perturbed-attention guidance does.

    Such a hook replaces `F.scaled_dot_product_attention` while the layer runs, which slicemod's kernels do not call.
    """
    hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
    acting = [name for name, hook in hooks.items() if getattr(hook, "skip_attention_scores", False)]
    return (
        f"its hook {acting[0]} of diffusers skips the attention's scores, which a swap would undo" if acting else None
    )


HOSTS.append(DiffusersHost())
