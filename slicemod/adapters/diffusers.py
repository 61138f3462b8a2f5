"""diffusers: `SlicemodAttnProcessor`, an attention processor for its `Attention` layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from slicemod.attention import attend
from slicemod.plan import SlicePlan
from slicemod.slice_config import SliceConfig
from slicemod.swap import HOSTS

# The processors that compute plain attention, which is what SlicemodAttnProcessor computes too.
_PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


class SlicemodAttnProcessor:
    """Attention of a diffusers `Attention` layer, in slices; does all that diffusers' AttnProcessor2_0 does.

    Args:
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.

    Attributes:
        plan: the plan of the last eager call.
    """

    def __init__(self, slicing: SliceConfig | Mapping[str, Any] | None = None) -> None:
        self.slicing = SliceConfig.of(slicing)
        self.plan: SlicePlan | None = None
        self.replaced: object = None

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
        """Attend as `attn`, a diffusers `Attention`, is configured to.

        Args:
            attn: the layer: projections, norms, residual.
            hidden_states: `(B, N, C)` or `(B, C, height, width)`.
            encoder_hidden_states: `(B, M, C')`; `hidden_states` when left out.
            attention_mask: additive, `(B, 1 or N, M)`, as diffusers' models pass it.
            temb: embedding for a layer with spatial norm.

        Returns:
            As `hidden_states`.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_size = hidden_states.shape[2:] if hidden_states.ndim == 4 else None
        if image_size is not None:
            hidden_states = rearrange(hidden_states, "b c h w -> b (h w) c")
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        batch, keys, _ = encoder_hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])  # (B, H, 1 or N, M)
        query, key, value = (
            rearrange(tensor, "b n (h d) -> b h n d", h=attn.heads)
            for tensor in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        output = attend(self, query, key, value, attention_mask, self.slicing, attn.scale)
        output = rearrange(output, "b h n d -> b n (h d)").to(query.dtype)
        output = attn.to_out[1](attn.to_out[0](output))
        if image_size is not None:
            height, width = image_size
            output = rearrange(output, "b (h w) c -> b c h w", h=height, w=width)
        if attn.residual_connection:
            output = output + residual
        result: Tensor = output / attn.rescale_output_factor
        return result


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
        return processor if isinstance(processor, SlicemodAttnProcessor) and processor.replaced is not None else None

    def obstacle(self, module: nn.Module) -> str | None:
        """A processor that computes something else than plain attention is left alone."""
        processor = type(_processor(module)).__name__
        if processor in (*_PLAIN_PROCESSORS, SlicemodAttnProcessor.__name__):
            return None
        return f"its processor {processor} does more than plain attention"

    def swap(self, parent: nn.Module, child: str, slicing: SliceConfig) -> SlicemodAttnProcessor:
        """Set a `SlicemodAttnProcessor` on the layer."""
        module = parent.get_submodule(child)
        processor = SlicemodAttnProcessor(slicing)
        processor.replaced = _processor(module)
        _set_processor(module, processor)
        return processor

    def restore(self, parent: nn.Module, child: str) -> None:
        """Set the processor that was there before."""
        module = parent.get_submodule(child)
        processor: Any = _processor(module)
        _set_processor(module, processor.replaced)


def _processor(module: nn.Module) -> object:
    return vars(module).get("processor") or dict(module.named_children()).get("processor")


def _set_processor(module: nn.Module, processor: object) -> None:
    set_processor: Any = module.set_processor
    set_processor(processor)


HOSTS.append(DiffusersHost())
