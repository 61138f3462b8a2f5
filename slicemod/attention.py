"""MemoryAwareCrossAttention: the CrossAttention of latent-diffusion UNets, within a memory budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from slicemod.attend import attend, attend_in_parts, plan_parts, recomputed
from slicemod.call import needs_grad
from slicemod.config import SliceConfig
from slicemod.layers.heads import merge_heads, split_heads
from slicemod.layers.projection import project
from slicemod.layers.streaming import projections_of
from slicemod.plan import SlicePlan


class MemoryAwareCrossAttention(nn.Module):
    """Multi-head attention of `x` to `context`, or of `x` to itself.

    It can take the place of CrossAttention of CompVis LDM and Stability sgm: it has the same arguments, parameters
    (`to_q.weight`, `to_k.weight`, `to_v.weight`, `to_out.0.weight`, `to_out.0.bias`) and results. The attribute `plan`
    is the plan of the last eager call.

    Args:
        query_dim: channels `C` of `x` and of the output.
        context_dim: channels of `context`; `query_dim` when left out.
        heads: number of heads `H`.
        dim_head: size `D` of a head.
        dropout: probability of dropping an output channel after the last projection.
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.

    Raises:
        ValueError: a field of `slicing` has a value that is not accepted.

    >>> layer = MemoryAwareCrossAttention(32, heads=2, dim_head=16, slicing={"budget": "1MiB", "policy": "exact"})
    >>> layer(torch.zeros(1, 7, 32)).shape
    torch.Size([1, 7, 32])
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        *,
        slicing: SliceConfig | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.dim_head = dim_head
        self.scale = dim_head**-0.5
        self.slicing = SliceConfig.of(slicing)
        self.plan: SlicePlan | None = None  # of the last eager call
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        n_times_crossframe_attn_in_self: int = 0,
    ) -> Tensor:
        """Compute the attention.

        Args:
            x: `(B, N, C)`.
            context: `(B, M, context_dim)`; `x` when left out.
            mask: as in CompVis LDM, a bool mask `(B, ...)` with `M` elements for each item, True for the keys to look
                at. (An item whose mask is False everywhere looks at all keys with the same weight.) Or as in Stability
                sgm, a mask that `F.scaled_dot_product_attention` takes, `(N, M)` or `(B, H, N, M)`. A mask that could
                be either is read as LDM's.
            additional_tokens: `(B, T, C)`; they are put before `x`, and removed from the output.
            n_times_crossframe_attn_in_self: the number of frames of a video. Each run of so many items of the batch
                uses the key and value of its first item. 0 for none.

        Returns:
            `(B, N, C)`.

        Raises:
            NotEnoughMemoryError: no plan fits the budget.
            ValueError: the mask or the batch size does not fit.
        """
        if self.slicing.recomputes_layers and needs_grad(x, context, mask, *self.parameters()):
            return recomputed(self._attend, x, context, mask, additional_tokens, n_times_crossframe_attn_in_self)
        return self._attend(x, context, mask, additional_tokens, n_times_crossframe_attn_in_self)

    def _attend(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, additional_tokens: Tensor | None, frames: int
    ) -> Tensor:
        own_tokens = x.shape[1]
        if additional_tokens is not None:
            x = torch.cat([additional_tokens, x], dim=1)
        context = x if context is None else context
        if mask is None and not frames and (plan := plan_parts(self, x, context, self.heads)) is not None:
            parts = projections_of(self.to_q, self.to_k, self.to_v, self.to_out, x, context)
            if parts is not None:
                output = attend_in_parts(self, plan, parts, x, context, self.scale)
                return output if additional_tokens is None else output[:, -own_tokens:]
        query, key, value = project(self.to_q, x), project(self.to_k, context), project(self.to_v, context)
        if frames:
            key, value = _first_of_each(key, frames), _first_of_each(value, frames)
        heads = self.heads
        query, key, value = split_heads(query, heads), split_heads(key, heads), split_heads(value, heads)
        if mask is not None and _is_key_mask(mask, key):
            query, mask = apply_key_mask(query, mask)
        output = attend(self, query, key, value, mask, self.scale)
        del query, key, value  # frees them before the last projection allocates its output
        output = merge_heads(output)
        return project(self.to_out, output if additional_tokens is None else output[:, -own_tokens:])

    def extra_repr(self) -> str:
        """Sizes, slicing and the last plan, in the module's `repr`."""
        plan = "" if self.plan is None else f", plan: {self.plan}"
        return f"heads={self.heads}, dim_head={self.dim_head}, {self.slicing}{plan}"


def _first_of_each(tensor: Tensor, times: int) -> Tensor:
    """`(B, M, C)` with every run of `times` items replaced by its first item, as in arXiv 2303.13439."""
    if tensor.shape[0] % times:
        raise ValueError(
            f"n_times_crossframe_attn_in_self: expected a divisor of the batch, {tensor.shape[0]}; got {times}. "
            "Pass the number of frames of one video."
        )
    return repeat(tensor[::times], "b m c -> (b times) m c", times=times)


def _is_key_mask(mask: Tensor, key: Tensor) -> bool:
    batch, _, keys, _ = key.shape
    return mask.dtype == torch.bool and mask.shape[0] == batch and mask.numel() == batch * keys


def apply_key_mask(query: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Query and SDPA mask `(B, 1, 1, M)` with the result that LDM's mask gives.

    LDM masks by a large negative number instead of -inf. An item whose keys are all masked then looks at all of them
    with the same weight. A query of zeros without a mask gives that result.
    """
    mask = rearrange(mask, "b ... -> b 1 1 (...)")
    any_key = mask.any(-1, keepdim=True)  # (B, 1, 1, 1)
    return query * any_key, mask | ~any_key
