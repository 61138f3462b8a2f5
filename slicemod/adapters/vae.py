"""The VAE of diffusers and of CompVis LDM: its encoder and its decoder become a `StripwiseHalf` with the same parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slicemod.adapters.known_code import KNOWN_VAE, forward_methods, is_known
from slicemod.adapters.own_code import altered
from slicemod.adapters.replacement import ReplacingHost
from slicemod.config import SliceConfig
from slicemod.layers.plain_module import runs_alone
from slicemod.on_cpu.prepared import Prepared
from slicemod.swap import HOSTS
from slicemod.vae.half import StripwiseHalf
from slicemod.vae.layers import Activation, Convolution, Downsample, Layer, Resnet, Upsample, Whole, silu

_KEPT = ("slicing", "plan", "describe", "whole", "training")  # attributes of a StripwiseHalf that are its own


class VaeHost(ReplacingHost):
    """`Encoder` and `Decoder` of diffusers' and LDM's `AutoencoderKL`."""

    name = "VAE"
    role = "VAE half"
    known = KNOWN_VAE
    parts = (
        "conv_in",
        *("down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act"),
        *("down", "mid", "up", "norm_out"),
        "conv_out",
    )

    def matches(self, original: nn.Module) -> bool:
        """Whether the class has the name, and the module the parts that both hosts have."""
        return type(original).__name__ in ("Encoder", "Decoder") and all(
            isinstance(getattr(original, part, None), nn.Module) for part in ("conv_in", "conv_out")
        )

    def misfit(self, module: nn.Module) -> str | None:
        """That the module has a part that computes something else than is known; None if it has none."""
        if not any(hasattr(module, part) for part in ("mid", "mid_block")):
            return "it has no middle block"
        if any(isinstance(part, Prepared) for part in module.modules()):
            return "it is prepared for the CPU, which strips of rows are not planned for"
        composed = (part for part in module.modules() if part is not module and _is_composed(part))
        for part in composed:
            changed = altered(part, forward_methods(type(part)))
            if changed is not None:
                return f"of its {type(part).__name__}, {changed}"
            if not is_known(type(part), KNOWN_VAE):
                return f"its {type(part).__qualname__} has a forward that slicemod does not know"
        try:
            describe(module)
        except ValueError as error:
            return str(error)
        return None

    def replacement(self, original: Any, slicing: SliceConfig) -> StripwiseHalf:
        """A StripwiseHalf, which gets the original's parts."""
        return StripwiseHalf(describe, type(original).forward, slicing)

    def _hand_over(self, source: nn.Module, target: nn.Module) -> None:
        """Parts, hooks and mode; and the plain attributes, which the original's code reads."""
        for name, part in vars(source)["_modules"].items():  # in the order of the state dict's keys
            setattr(target, name, part)
        plain = {name: value for name, value in vars(source).items() if not name.startswith("_") and name not in _KEPT}
        checkpointing = {name: value for name, value in vars(source).items() if name == "_gradient_checkpointing_func"}
        vars(target).update(plain | checkpointing)
        self._hand_over_hooks(source, target)


def describe(module: Any) -> list[Layer]:
    """The layers of an encoder or decoder in order.

    Raises:
        ValueError: a part computes something else than is known.
    """
    return list(_layers(module))


def _layers(module: Any) -> Iterator[Layer]:
    yield Convolution(module.conv_in)
    if hasattr(module, "mid_block"):
        yield from _diffusers_layers(module)
        yield _out(module.conv_norm_out, module.conv_act, module.conv_out)
    else:
        yield from _ldm_layers(module)
        yield _out(module.norm_out, None, module.conv_out)


def _diffusers_layers(module: Any) -> Iterator[Layer]:
    for block in getattr(module, "down_blocks", ()):
        yield from map(_diffusers_resnet, _own(block).resnets)
        for part in block.downsamplers or ():
            _expect(part.use_conv and part.padding == 0 and part.norm is None, "it shrinks in another way")
            yield Downsample(_own(part).conv)
    middle = _own(module.mid_block)
    yield _diffusers_resnet(middle.resnets[0])
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        if attention is not None:
            yield Whole(attention, resnet.in_channels)
        yield _diffusers_resnet(resnet)
    for block in getattr(module, "up_blocks", ()):
        yield from map(_diffusers_resnet, _own(block).resnets)
        for part in block.upsamplers or ():
            plain = part.use_conv and part.interpolate and part.norm is None and part.name == "conv"
            _expect(plain and not part.use_conv_transpose, "it enlarges in another way")
            yield Upsample(_own(part).conv)


def _diffusers_resnet(part: Any) -> Resnet:
    resizes = part.upsample is not None or part.downsample is not None
    _expect(not resizes and part.time_emb_proj is None, "a resnet resizes or takes an embedding")
    _expect(part.time_embedding_norm in ("default", "group"), f"a resnet normalises by {part.time_embedding_norm}")
    activation = _activation(part.nonlinearity)
    return _resnet(_own(part), activation, part.conv_shortcut, float(part.output_scale_factor))


def _ldm_layers(module: Any) -> Iterator[Layer]:
    _expect(not getattr(module, "give_pre_end", False), "it gives what comes before its end")
    _expect(not getattr(module, "tanh_out", False), "it ends with a tanh")
    for level in getattr(module, "down", ()):
        yield from _ldm_blocks(level)
        if hasattr(level, "downsample"):
            _expect(level.downsample.with_conv, "it shrinks without a convolution")
            yield Downsample(_own(level.downsample).conv)
    yield _ldm_resnet(module.mid.block_1)
    yield Whole(module.mid.attn_1, module.mid.block_1.out_channels)
    yield _ldm_resnet(module.mid.block_2)
    for level in reversed(getattr(module, "up", ())):
        yield from _ldm_blocks(level)
        if hasattr(level, "upsample"):
            _expect(level.upsample.with_conv, "it enlarges without a convolution")
            yield Upsample(_own(level.upsample).conv)


def _ldm_blocks(level: Any) -> Iterator[Layer]:
    for number, block in enumerate(level.block):
        yield _ldm_resnet(block)
        if len(level.attn) > 0:
            yield Whole(level.attn[number], block.out_channels)


def _ldm_resnet(part: Any) -> Resnet:
    _expect(not hasattr(part, "temb_proj"), "a resnet takes an embedding")
    shortcut = getattr(part, "nin_shortcut", None)
    _expect(not hasattr(part, "conv_shortcut"), "a resnet has a shortcut of 3x3 pixels")
    return _resnet(_own(part), silu, shortcut)


def _resnet(part: Any, activation: Activation, shortcut: Any, scale: float = 1.0) -> Resnet:
    _expect(part.dropout.p == 0 or not part.dropout.training, "a resnet drops activations")
    first = Convolution(part.conv1, _group_norm(part.norm1), activation)
    return Resnet(first, Convolution(part.conv2, _group_norm(part.norm2), activation), shortcut, scale)


def _out(norm: Any, activation: Any, conv: Any) -> Convolution:
    return Convolution(conv, _group_norm(norm), silu if activation is None else _activation(activation))


def _group_norm(norm: Any) -> nn.GroupNorm:
    _expect(type(norm) is nn.GroupNorm, f"it has a {type(norm).__name__}, not a group norm")
    plain: nn.GroupNorm = _own(norm)
    return plain


def _activation(module: Any) -> Activation:
    return silu if type(module) is nn.SiLU else module


def _own(part: Any) -> Any:
    """The part, which is not called as a module: its hooks and a `forward` that others gave it would be missed."""
    if not torch.compiler.is_compiling():
        _expect(runs_alone(part), f"its {type(part).__name__} has hooks, or a forward that others gave it")
    return part


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _is_composed(part: nn.Module) -> bool:
    """A part of the VAE's own code, which is not called: no list, no module of PyTorch, nothing inside of attention."""
    names = ("ResnetBlock", "Upsample", "Downsample", "UNetMidBlock", "UpDecoderBlock", "DownEncoderBlock")
    return type(part).__name__.startswith(names)


HOSTS.append(VaeHost())
