"""The peers: ways to compute attention, each fitted into the same layer, the same UNet or taken alone."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.config import SliceConfig
from slicemod.functional import sliced_attention
from slicemod.kernels.sliced.planner import POLICIES
from slicemod.on_cpu.prepare import prepare_for_cpu
from slicemod.reference import reference_attention
from slicemod.rounding import ceil_div
from slicemod.swap import swap_attention
from slicemod.torch_internals import has_onednn
from slicemod.user_error import UserError

Attend = Callable[..., Tensor]  # (B, H, N, D), (B, H, M, D) twice, SDPA's keywords -> (B, H, N, D)


class Peer(ABC):
    """One way to compute attention.

    Attributes:
        name: what `--peers` calls it.
        needs: the package that it comes from, which may not be installed; None for what slicemod needs itself.
        scores_held: the share of all scores that it holds at once.
        devices: the kinds of device that it exists for.
    """

    needs: str | None = None
    scores_held = 0.0
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot be tried on this machine, or None."""
        if self.needs is not None and find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None if device.type in self.devices else f"has no kernel for {device.type}"

    @abstractmethod
    def in_layer(self, layer: Any) -> nn.Module:
        """A module that computes what the MemoryAwareCrossAttention `layer` does, with its projections."""

    @abstractmethod
    def in_unet(self, unet: Any) -> nn.Module:
        """The diffusers UNet, or Attention layer, itself, its attention changed."""

    def alone(self) -> nn.Module | None:
        """Attention of query, key and value; None where the peer comes with projections only."""
        return None


class AttentionFunction(Peer):
    """A function of query, key and value."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Attend],
        *,
        needs: str | None = None,
        scores_held: float = 0.0,
        devices: tuple[str, ...] = Peer.devices,
    ) -> None:
        super().__init__(name)
        self.make, self.needs, self.scores_held, self.devices = make, needs, scores_held, devices

    def in_layer(self, layer: Any) -> nn.Module:
        """The projections of `layer` around the function."""
        return _LayerWith(layer, self.make())

    def in_unet(self, unet: Any) -> nn.Module:
        """Processors that project and call the function."""
        attend = self.make()
        return _with_processors(unet, lambda _: _Projecting(attend))

    def alone(self) -> nn.Module | None:
        """The function."""
        return _Alone(self.make())


class DiffusersProcessor(Peer):
    """One of diffusers' own attention processors."""

    def __init__(self, name: str, make: Callable[[Any], object], scores_held: float = 0.0) -> None:
        super().__init__(name)
        self.make, self.scores_held = make, scores_held

    def in_layer(self, layer: Any) -> nn.Module:
        """A diffusers Attention with the projections of `layer`."""
        with torch.device("meta"):
            attention: Any = Attention(
                layer.to_q.in_features, layer.to_k.in_features, layer.heads, dim_head=layer.dim_head
            )
        attention.to_q, attention.to_k, attention.to_v = layer.to_q, layer.to_k, layer.to_v
        attention.to_out[0] = layer.to_out[0]
        return self.in_unet(attention)

    def in_unet(self, unet: Any) -> nn.Module:
        """The processor in every attention layer."""
        return _with_processors(unet, self.make)


class CompVisLayer(Peer):
    """CrossAttention of CompVis LDM as it stands; in half precision under autocast, as its own scripts run it."""

    needs, scores_held = "ldm", 1.0

    def in_layer(self, layer: Any) -> nn.Module:
        """A CrossAttention with the projections of `layer`."""
        return _Autocast(self._with_parts_of(layer, layer.dim_head, layer.to_out))

    def in_unet(self, unet: Any) -> nn.Module:
        """A CrossAttention in the place of every processor."""

        def processor(attention: Any) -> object:
            dim_head = attention.to_q.out_features // attention.heads
            own = _Autocast(self._with_parts_of(attention, dim_head, nn.Sequential(*attention.to_out)))
            return lambda _, x, encoder_hidden_states=None, **rest: own(x, encoder_hidden_states)

        return _with_processors(unet, processor)

    def _with_parts_of(self, layer: Any, dim_head: int, to_out: nn.Module) -> nn.Module:
        module: Any = import_module("ldm.modules.attention")
        with torch.device("meta"):
            own: nn.Module = module.CrossAttention(
                layer.to_q.in_features, layer.to_k.in_features, layer.heads, dim_head
            )
        for part in ("to_q", "to_k", "to_v"):
            setattr(own, part, layer.get_submodule(part))
        own.to_out = to_out
        return own


class Slicemod(Peer):
    """Ours, with some settings."""

    def __init__(self, name: str, slicing: SliceConfig, devices: tuple[str, ...] = Peer.devices) -> None:
        super().__init__(name)
        self.slicing, self.devices = slicing, devices

    def in_layer(self, layer: Any) -> nn.Module:
        """A MemoryAwareCrossAttention with these settings and the projections of `layer`."""
        with torch.device("meta"):
            own = MemoryAwareCrossAttention(
                layer.to_q.in_features, layer.to_k.in_features, layer.heads, layer.dim_head, slicing=self.slicing
            )
        for part in ("to_q", "to_k", "to_v", "to_out"):
            setattr(own, part, layer.get_submodule(part))
        return own

    def in_unet(self, unet: Any) -> nn.Module:
        """`swap_attention` with these settings."""
        swap_attention(unet, self.slicing)
        swapped: nn.Module = unet
        return swapped

    def alone(self) -> nn.Module | None:
        """`sliced_attention` with these settings."""
        return _Alone(partial(sliced_attention, slicing=self.slicing))


class SlicemodWhole(Slicemod):
    """Ours, of a UNet more than the attention. For inference."""

    def in_unet(self, unet: Any) -> nn.Module:
        """Feed-forwards in slices too, and all that `prepare_for_cpu` does on a CPU."""
        swap_attention(unet, self.slicing, feed_forward=True)
        if has_onednn and all(weight.is_cpu for weight in unet.parameters()):
            prepare_for_cpu(unet)
        whole: nn.Module = unet
        return whole


class _LayerWith(nn.Module):
    """The projections of a MemoryAwareCrossAttention around another attention function."""

    def __init__(self, layer: MemoryAwareCrossAttention, attend: Attend) -> None:
        super().__init__()
        self.layer, self.attend = layer, attend

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        layer = self.layer
        output: Tensor = layer.to_out(_projected(layer, x, context, self.attend))
        return output


class _Projecting:
    """A processor of diffusers for the layers of its UNets, which have no mask, norm or residual of their own."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **rest: Any
    ) -> Tensor:
        output: Tensor = attn.to_out[1](
            attn.to_out[0](_projected(attn, hidden_states, encoder_hidden_states, self.attend))
        )
        return output


def _projected(layer: Any, x: Tensor, context: Tensor | None, attend: Attend) -> Tensor:
    context = x if context is None else context
    query, key, value = (
        rearrange(tensor, "b n (h d) -> b h n d", h=layer.heads)
        for tensor in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
    )
    return rearrange(attend(query, key, value), "b h n d -> b n (h d)")


class _Alone(nn.Module):
    """An attention function as a module."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        grouped: bool = False,
    ) -> Tensor:
        options = {"dropout_p": dropout, "is_causal": causal, "enable_gqa": grouped}
        used: dict[str, Any] = {name: option for name, option in options.items() if option}
        if mask is not None:
            used["attn_mask"] = mask
        return self.attend(query, key, value, **used)  # of SDPA's options a plain call has none, which every peer takes


class _Autocast(nn.Module):
    """A module that gets half-precision inputs under autocast."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype.itemsize == 2):
            output: Tensor = self.module(x, context)
        return output


def _with_processors(unet: Any, make: Callable[[Any], object]) -> nn.Module:
    for layer in unet.modules():
        if isinstance(layer, Attention):
            set_processor: Any = layer.set_processor
            set_processor(make(layer))
    changed: nn.Module = unet
    return changed


def _full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    output: Tensor = F.dropout(scores.softmax(-1), dropout_p) @ value
    return output


def _sdpa_by(backend: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, **options)

    return attend


def _plain_only(attend: Attend) -> Attend:
    """A function whose options are not SDPA's."""

    def plain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if options:
            raise ValueError(f"is not measured with {', '.join(options)}")
        return attend(query, key, value)

    return plain


def _flex() -> Attend:
    flex_attention: Any = import_module("torch.nn.attention.flex_attention").flex_attention
    return _plain_only(torch.compile(flex_attention))


def _memory_efficient() -> Attend:
    # It calls checkpoint without this argument in every training step.
    warnings.filterwarnings("ignore", message=".*use_reentrant", category=UserWarning)
    return _plain_only(import_module("memory_efficient_attention_pytorch").memory_efficient_attention)


def _xformers() -> Attend:
    ops: Any = import_module("xformers.ops")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output: Tensor = ops.memory_efficient_attention(*tokens_first)
        return output.transpose(1, 2)

    return _plain_only(attend)


SDPA = AttentionFunction("sdpa", lambda: F.scaled_dot_product_attention)  # what the others are measured against
FULL = AttentionFunction("full", lambda: _full, scores_held=1.0)
OURS = "slicemod"  # with its default settings
REFERENCE = AttentionFunction("reference", lambda: reference_attention, scores_held=1.0)


def all_peers(budget: str) -> tuple[Peer, ...]:
    """Every peer there is, `SDPA` first.

    Args:
        budget: of slicemod's policy `exact`; the policies of others decide by the free memory, as they do at home.
    """
    cuda = ("cuda",)
    ours = [Slicemod(OURS, SliceConfig(budget, "exact")), Slicemod("slicemod-fused", SliceConfig(kernel="fused"))]
    ours.append(SlicemodWhole("slicemod-whole", SliceConfig(budget, "exact")))
    ours.append(Slicemod("slicemod-triton", SliceConfig(kernel="triton"), devices=cuda))
    ours += [
        Slicemod(f"slicemod-{policy}", SliceConfig(budget if policy == "exact" else "auto", policy, "math"))
        for policy in POLICIES
    ]
    return (
        SDPA,
        AttentionFunction("sdpa-flash", lambda: _sdpa_by(SDPBackend.FLASH_ATTENTION)),
        AttentionFunction("sdpa-efficient", lambda: _sdpa_by(SDPBackend.EFFICIENT_ATTENTION), devices=cuda),
        AttentionFunction("sdpa-cudnn", lambda: _sdpa_by(SDPBackend.CUDNN_ATTENTION), devices=cuda),
        AttentionFunction("sdpa-math", lambda: _sdpa_by(SDPBackend.MATH), scores_held=1.0),
        AttentionFunction("flex", _flex),
        FULL,
        DiffusersProcessor("diffusers", lambda _: AttnProcessor2_0()),
        DiffusersProcessor("diffusers-full", lambda _: AttnProcessor(), scores_held=1.0),
        # "auto" of diffusers' set_attention_slice halves the heads, "max" takes one at a time.
        DiffusersProcessor(
            "diffusers-sliced", lambda layer: SlicedAttnProcessor(ceil_div(layer.heads, 2)), scores_held=0.5
        ),
        DiffusersProcessor("diffusers-sliced-max", lambda _: SlicedAttnProcessor(1), scores_held=0.2),
        CompVisLayer("ldm"),
        AttentionFunction("memory-efficient", _memory_efficient, needs="memory_efficient_attention_pytorch"),
        AttentionFunction("xformers", _xformers, needs="xformers", devices=cuda),
        *ours,
    )


def find_peers(patterns: list[str], budget: str) -> list[Peer]:
    """The peers that any of some shell-style patterns matches, and `SDPA` before them.

    Raises:
        UserError: a pattern matches no peer.
    """
    peers = all_peers(budget)
    for pattern in patterns:
        if not any(fnmatchcase(peer.name, pattern) for peer in peers):
            names = ", ".join(peer.name for peer in peers)
            raise UserError(f"--peers: expected names or patterns out of {names}; got {pattern!r}. Correct it.")
    return [peer for peer in peers if peer is SDPA or any(fnmatchcase(peer.name, pattern) for pattern in patterns)]
