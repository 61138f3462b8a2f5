"""The peers: one cross-attention layer, its attention computed in several ways with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.reference import reference_attention
from slicemod.slice_config import SliceConfig


class Workload(NamedTuple):
    """One layer of a UNet: `(batch, queries, channels)` in, `heads` of `head_dim`, `context` tokens or its own."""

    name: str
    batch: int
    queries: int
    channels: int
    heads: int
    head_dim: int
    context: tuple[int, int] | None = None  # tokens, channels


WORKLOADS = (
    Workload("SD1.5 64x64", 1, 4096, 320, 8, 40),
    Workload("SD1.5 32x32", 1, 1024, 640, 8, 80),
    Workload("SDXL 64x64", 1, 4096, 640, 10, 64),
    Workload("SD1.5 64x64, 77 tokens", 1, 4096, 320, 8, 40, (77, 768)),
)
QUICK_WORKLOADS = (WORKLOADS[1], WORKLOADS[3])

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class _LayerWith(nn.Module):
    """The projections of a MemoryAwareCrossAttention around another attention function."""

    def __init__(self, layer: MemoryAwareCrossAttention, attend: Attend) -> None:
        super().__init__()
        self.layer, self.attend = layer, attend

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        layer = self.layer
        context = x if context is None else context
        query, key, value = (
            rearrange(tensor, "b n (h d) -> b h n d", h=layer.heads)
            for tensor in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
        )
        output: Tensor = layer.to_out(rearrange(self.attend(query, key, value), "b h n d -> b n (h d)"))
        return output


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    output: Tensor = scores.softmax(-1) @ value
    return output


def oracle(work: Workload, layer: MemoryAwareCrossAttention) -> nn.Module:
    """The layer in float64 with unsliced attention."""
    double = make_layer(work).double()
    double.load_state_dict(layer.state_dict())
    return _LayerWith(double, reference_attention)


def peers_of(work: Workload, layer: MemoryAwareCrossAttention) -> dict[str, nn.Module]:
    """The ways to compute the layer that are compared; "SDPA", what the others are measured against, comes first.

    diffusers' slicing is left out where diffusers is not installed.
    """
    peers: dict[str, nn.Module] = {
        "SDPA": _LayerWith(layer, F.scaled_dot_product_attention),
        "full attention": _LayerWith(layer, _plain),
    }
    sliced = _diffusers_sliced(work, layer)
    if sliced is not None:
        peers["diffusers slicing"] = sliced
    for slicing in (SliceConfig("64MiB", "exact"), SliceConfig("64MiB", "exact", kernel="math")):
        peers[f"slicemod {slicing.kernel}"] = _with_slicing(work, layer, slicing)
    return peers


def make_layer(work: Workload) -> MemoryAwareCrossAttention:
    """The layer of a workload, with random weights."""
    context_dim = None if work.context is None else work.context[1]
    return MemoryAwareCrossAttention(work.channels, context_dim, work.heads, work.head_dim)


def _with_slicing(work: Workload, layer: MemoryAwareCrossAttention, slicing: SliceConfig) -> nn.Module:
    with torch.device("meta"):
        swapped = make_layer(work)
    swapped.slicing = slicing
    for part in ("to_q", "to_k", "to_v", "to_out"):
        setattr(swapped, part, layer.get_submodule(part))
    return swapped


def _diffusers_sliced(work: Workload, layer: MemoryAwareCrossAttention) -> nn.Module | None:
    try:
        from diffusers.models.attention_processor import Attention, SlicedAttnProcessor
    except ModuleNotFoundError:
        return None
    context_dim = None if work.context is None else work.context[1]
    with torch.device("meta"):
        attention: Any = Attention(work.channels, context_dim, work.heads, dim_head=work.head_dim)
    for part in ("to_q", "to_k", "to_v"):
        setattr(attention, part, layer.get_submodule(part))
    attention.to_out[0] = layer.to_out[0]
    attention.set_processor(SlicedAttnProcessor(slice_size=1))
    sliced: nn.Module = attention
    return sliced
