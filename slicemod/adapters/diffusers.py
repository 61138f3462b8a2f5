"""diffusers: `SlicemodAttnProcessor`, an attention processor for its `Attention` layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from slicemod.attend import attend, attend_in_parts, plan_parts, recomputed
from slicemod.call import needs_grad
from slicemod.config import SliceConfig
from slicemod.layers.heads import merge_heads, split_heads
from slicemod.layers.projection import project
from slicemod.layers.streaming import projections_of
from slicemod.plan import SlicePlan


class SlicemodAttnProcessor:
    """Computes the attention of a diffusers `Attention` layer within a memory budget.

    It does everything that diffusers' default processors do: AttnProcessor2_0, and for a layer with added key and value
    projections AttnAddedKVProcessor2_0.

    Args:
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.
        fused_projections: use the projections that `fuse_qkv_projections` made, as FusedAttnProcessor2_0 does.

    Attributes:
        plan: the plan of the last eager call.
    """

    def __init__(
        self, slicing: SliceConfig | Mapping[str, Any] | None = None, *, fused_projections: bool = False
    ) -> None:
        self.slicing = SliceConfig.of(slicing)
        self.fused_projections = fused_projections
        self.plan: SlicePlan | None = None
        self.replaced: Any = None  # the processor that `swap_attention` replaced by this one

    def __repr__(self) -> str:
        plan = "" if self.plan is None else f", plan: {self.plan}"
        return f"{type(self).__name__}({self.slicing}{plan})"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Compute the layer `attn`, a diffusers `Attention`, as it is configured.

        Args:
            attn: the layer: projections, norms, residual.
            hidden_states: `(B, N, C)` or `(B, C, height, width)`.
            encoder_hidden_states: `(B, M, C')`; `hidden_states` when left out.
            attention_mask: additive, `(B, 1 or N, M)`, as diffusers' models pass it.
            temb: the embedding for a layer with spatial norm.

        Returns:
            A tensor with the sizes of `hidden_states`.

        Raises:
            NotEnoughMemoryError: no plan fits the budget.
        """
        return self.attend_as(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def make_way(self, attn: Any) -> None:
        """Put the replaced processor back into `attn`, which has this one."""
        attn.set_processor(self.replaced)

    def attend_as(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
        more: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute the layer, as calling the processor does.

        `more`, if it is given, takes the query `(B, H, N, D)` and the output of the attention `(B, N, H D)`, and
        returns the output to project.
        """
        if self.slicing.recomputes_layers and needs_grad(hidden_states, encoder_hidden_states, *attn.parameters()):
            return recomputed(self._compute, attn, hidden_states, encoder_hidden_states, attention_mask, temb, more)
        return self._compute(attn, hidden_states, encoder_hidden_states, attention_mask, temb, more)

    def _compute(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
        more: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        added = attn.add_k_proj is not None
        is_image = added or hidden_states.ndim == 4
        if is_image:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, N, C)
        tokens = hidden_states
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            encoder_hidden_states = tokens if added else hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        mask = attention_mask
        if mask is not None:
            # The mask of a layer with added projections is for the added keys. Padding it adds the layer's own keys.
            mask = _key_mask(attn, mask, len(residual), (tokens if added else encoder_hidden_states).shape[1])
        output: Tensor
        plan = parts = None
        if mask is None and more is None and _has_only_projections(attn) and not self.fused_projections:
            plan = plan_parts(self, hidden_states, encoder_hidden_states, attn.heads)
        if plan is not None:
            parts = projections_of(attn.to_q, attn.to_k, attn.to_v, attn.to_out, hidden_states, encoder_hidden_states)
        if plan is not None and parts is not None:
            output = attend_in_parts(self, plan, parts, hidden_states, encoder_hidden_states, attn.scale)
        else:
            query, key, value = (
                split_heads(projected, attn.heads)
                for projected in _projections(attn, hidden_states, encoder_hidden_states, self.fused_projections)
            )
            del tokens, hidden_states, encoder_hidden_states
            if attn.norm_q is not None:
                query = attn.norm_q(query)
            if attn.norm_k is not None:
                key = attn.norm_k(key)
            output = attend(self, query, key, value, mask, attn.scale)
            del key, value
            output = merge_heads(output).to(query.dtype)
            if more is not None:
                output = more(query, output)
            del query  # frees it before the last projection allocates its output
            output = attn.to_out[1](project(attn.to_out[0], output))
        if is_image:
            output = output.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection or added:
            output = output + residual
        if not added and attn.rescale_output_factor != 1:
            output = output / attn.rescale_output_factor
        return output


def keep_signature(processor: type) -> None:
    """Keep the signature of a processor's `__call__`.

    diffusers asks for the signature whenever it calls a layer. Making it each time takes longer than launching
    attention on a GPU.
    """
    call: Any = processor.__call__
    call.__signature__ = signature(call)


keep_signature(SlicemodAttnProcessor)


def _has_only_projections(attn: Any) -> bool:
    """The layer does nothing to its queries, keys and values but to project them."""
    return attn.add_k_proj is None and attn.norm_q is None and attn.norm_k is None


def _projections(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Query `(B, N, H D)`, key and value `(B, M, H D)`."""
    if fused and encoder_hidden_states is hidden_states:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return query, key, value
    query = project(attn.to_q, hidden_states)
    if fused:
        return query, *attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
    if attn.add_k_proj is None:
        return query, project(attn.to_k, encoder_hidden_states), project(attn.to_v, encoder_hidden_states)
    key, value = attn.add_k_proj(encoder_hidden_states), attn.add_v_proj(encoder_hidden_states)
    if attn.only_cross_attention:
        return query, key, value
    own_key, own_value = attn.to_k(hidden_states), attn.to_v(hidden_states)
    return query, torch.cat([key, own_key], dim=1), torch.cat([value, own_value], dim=1)


def _key_mask(attn: Any, mask: Tensor, batch: int, keys: int) -> Tensor:
    """A mask as diffusers' models pass it, `(B or B H, ..., M)`, as `(B, 1 or H, 1 or N, M)`.

    The layer's own method pads it. It would also repeat it for every head, unless it is told that there are 0 items.
    """
    mask = attn.prepare_attention_mask(mask, keys, 0)
    return mask.reshape(batch, mask.shape[0] // batch, -1, mask.shape[-1])
