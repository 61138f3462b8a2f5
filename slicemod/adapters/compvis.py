"""CompVis LDM and its copies: a CrossAttention becomes a `MemoryAwareCrossAttention` with the same projections."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from slicemod.adapters.replacement import ReplacingHost
from slicemod.attention import MemoryAwareCrossAttention
from slicemod.config import SliceConfig
from slicemod.swap import HOSTS, swap_attention

_CLASSES = ("CrossAttention", "MemoryEfficientCrossAttention")
_PARTS = ("to_q", "to_k", "to_v", "to_out")
# ComfyUI and Forge ask their own function for attention, by settings that they pass from layer to layer.
_INSTEAD = "ComfyUI and Forge, which pass transformer_options, take slicemod by `slicemod install`"


class CrossAttentionHost(ReplacingHost):
    """Modules that have the parts of CrossAttention and are called like it."""

    parts = _PARTS
    kind: type[MemoryAwareCrossAttention] = MemoryAwareCrossAttention  # the class that replaces them

    def misfit(self, module: nn.Module) -> str | None:
        """That the layer is called in another way, or that its sizes do not fit; None if all is well."""
        return self._other_call(module) or _other_sizes(module)

    def replacement(self, original: Any, slicing: SliceConfig) -> MemoryAwareCrossAttention:
        """A MemoryAwareCrossAttention with the same sizes."""
        inner = original.to_q.out_features
        swapped = self.kind(
            original.to_q.in_features,
            original.to_k.in_features,
            original.heads,
            inner // original.heads,
            slicing=slicing,
        )
        swapped.scale = float(getattr(original, "scale", swapped.scale))
        return swapped

    def _other_call(self, module: nn.Module) -> str | None:
        """That the module's `forward` takes other arguments than that of the class that replaces it."""
        arguments, ours = arguments_of(type(module)), arguments_of(self.kind)
        if arguments == ours[: len(arguments)]:
            return None
        advice = f"; {_INSTEAD}" if "transformer_options" in arguments else ""
        return f"its forward takes ({', '.join(arguments)}) instead of ({', '.join(ours)}){advice}"


class CompVisHost(CrossAttentionHost):
    """`CrossAttention` and `MemoryEfficientCrossAttention` of `ldm` and `sgm`, known by class name and parts."""

    name = "CompVis LDM"

    def matches(self, original: nn.Module) -> bool:
        """Whether the class has a known name, and the module has the projections of a CrossAttention."""
        return type(original).__name__ in _CLASSES and has_parts(original)


def has_parts(module: nn.Module) -> bool:
    """Whether the module has the four projections and a number of heads."""
    parts = all(isinstance(vars(module)["_modules"].get(part), nn.Module) for part in _PARTS)
    return parts and isinstance(getattr(module, "heads", None), int)


def arguments_of(kind: type) -> tuple[str, ...]:
    """The names of the arguments of a class's `forward`, but for a `**` at their end."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    return tuple(each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD)


def _other_sizes(module: Any) -> str | None:
    """That the projections do not have the sizes of multi-head attention; None if they do."""
    for part in ("to_q", "to_k", "to_v"):
        projection = getattr(module, part)
        if not all(isinstance(getattr(projection, size, None), int) for size in ("in_features", "out_features")):
            return f"its {part} is a {type(projection).__name__}, not a linear layer"
    query, key, value = module.to_q.out_features, module.to_k.out_features, module.to_v.out_features
    if query != key or query % module.heads or value % module.heads:
        return f"its projections give {query}, {key} and {value} channels, which {module.heads} heads cannot share"
    if module.to_k.in_features != module.to_v.in_features:
        return f"its to_k takes {module.to_k.in_features} channels and its to_v {module.to_v.in_features}"
    if isinstance(module.to_out, nn.ModuleDict):
        return "its to_out is a ModuleDict, which cannot be called"
    return None


def build(unet: Mapping[str, Any], slicing: SliceConfig | Mapping[str, Any] | None = None) -> nn.Module:
    """A model of an LDM config with its attention swapped, for `instantiate_from_config` of `ldm` and `sgm`.

    In the config of a latent-diffusion model::

        unet_config:
          target: slicemod.adapters.compvis.build
          params:
            unet: {target: ldm.modules.diffusionmodules.openaimodel.UNetModel, params: {...}}
            slicing: {budget: 2GiB, policy: exact}

    Args:
        unet: the former `unet_config`: `target`, the dotted name of a class, and `params`, its arguments.
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.

    Returns:
        The model that the block describes.

    Raises:
        ValueError: the block has no target, the target does not exist, or its model has no attention to swap.
    """
    target = unet.get("target") if isinstance(unet, Mapping) else None
    if not isinstance(target, str):
        raise ValueError(
            f"unet: expected a block with target and params, as unet_config had it; got {unet!r}. "
            "Move the former target and params of unet_config there."
        )
    module, _, name = target.rpartition(".")
    try:
        make = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"unet.target: expected the dotted name of a class that can be imported; got {target!r}: {error}. "
            "Correct the name or install the package."
        ) from error
    model: nn.Module = make(**unet.get("params", {}))
    swap_attention(model, slicing)
    return model


HOSTS.append(CompVisHost())
