"""diffusers' attention processor of IP-Adapter within a memory budget: attention to the text and to each image prompt.

The processor's weights are part of the model, and diffusers looks for its class to set scales. So the object stays.
Swapping changes its class to a subclass that is also a `SlicemodAttnProcessor`, and restoring changes the class back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor

from slicemod.adapters.diffusers import SlicemodAttnProcessor, keep_signature
from slicemod.config import SliceConfig
from slicemod.functional import sliced_attention
from slicemod.layers.heads import merge_heads, split_heads


class SlicemodIPAdapterAttnProcessor(SlicemodAttnProcessor, IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """IPAdapterAttnProcessor2_0, computed by `sliced_attention`. Made by `slice_ip_adapter`."""

    fused_projections = False  # diffusers has no such processor for fused ones
    scale: list[Any]
    num_tokens: tuple[int, ...]
    to_k_ip: Any
    to_v_ip: Any

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, list[Tensor]] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Tensor | list[Tensor | None] | None = None,
    ) -> Tensor:
        """Compute attention to the text, plus attention to each image prompt times its scale.

        Args:
            attn: the layer.
            hidden_states: `(B, N, C)` or `(B, C, height, width)`.
            encoder_hidden_states: the text `(B, M, C')`, and for each adapter its images `(B, images, tokens, C')`. Or
                one tensor, whose last tokens are the image's.
            attention_mask: additive, `(B, 1 or N, M)`.
            temb: embedding for a layer with spatial norm.
            ip_adapter_masks: for each adapter, where in the picture its images count, `(1, images, height, width)`.

        Returns:
            A tensor with the sizes of `hidden_states`.

        Raises:
            NotEnoughMemoryError: no plan fits the budget.
            ValueError: there are no image prompts, or the masks do not fit them.
        """
        if encoder_hidden_states is None:
            raise ValueError(
                "encoder_hidden_states: expected text and image prompts for a layer with IP-Adapter; got None. Pass "
                "added_cond_kwargs={'image_embeds': ...} to the UNet, or unload the adapter."
            )
        if isinstance(encoder_hidden_states, tuple):
            text, images = encoder_hidden_states
        else:
            text_tokens = encoder_hidden_states.shape[1] - self.num_tokens[0]
            text, images = encoder_hidden_states[:, :text_tokens], [encoder_hidden_states[:, text_tokens:]]
        masks = self._masks(ip_adapter_masks, images)

        def with_images(query: Tensor, output: Tensor) -> Tensor:
            for index, tokens, scale, mask in self._prompts(images, masks):
                key, value = (
                    split_heads(project(tokens), attn.heads) for project in (self.to_k_ip[index], self.to_v_ip[index])
                )
                seen = sliced_attention(query, key, value, scale=attn.scale, slicing=self.slicing)
                seen = merge_heads(seen).to(query.dtype)
                if mask is not None:
                    # (B, N, H D)
                    where = IPAdapterMaskProcessor.downsample(mask, len(seen), seen.shape[1], seen.shape[2])
                    seen = seen * where.to(query)
                output = output + scale * seen
            return output

        return self.attend_as(attn, hidden_states, text, attention_mask, temb, with_images)

    def make_way(self, attn: Any) -> None:
        """Change the class back. The object has stayed in its layer."""
        original = self.replaced
        del self.slicing, self.plan, self.replaced
        self.__class__ = original

    def _prompts(
        self, images: list[Tensor], masks: list[Tensor | None]
    ) -> Iterator[tuple[int, Tensor, Any, Tensor | None]]:
        """Adapter, tokens `(B, M, C')`, scale and mask `(1, height, width)` of each image prompt that counts."""
        for index, (tokens, scale, mask) in enumerate(zip(images, self.scale, masks, strict=True)):
            if mask is None:
                if scale != 0:
                    yield index, tokens.flatten(1, -2), scale, None
                continue
            scales = scale if isinstance(scale, list) else [scale] * mask.shape[1]
            for image, one in enumerate(scales if any(scales) else []):
                yield index, tokens[:, image], one, mask[:, image]

    def _masks(self, masks: Tensor | list[Tensor | None] | None, images: list[Tensor]) -> list[Tensor | None]:
        if masks is None:
            return [None] * len(self.scale)
        masks = masks if isinstance(masks, list) else list(masks.unsqueeze(1))
        if not len(masks) == len(self.scale) == len(images):
            raise ValueError(
                f"ip_adapter_masks: expected one for each of {len(self.scale)} adapters; got {len(masks)} masks and "
                f"{len(images)} image prompts. Pass None for an adapter without a mask."
            )
        for mask, scale, tokens in zip(masks, self.scale, images, strict=True):
            if mask is None:
                continue
            scales = len(scale) if isinstance(scale, list) else tokens.shape[1]
            if mask.ndim != 4 or not mask.shape[1] == tokens.shape[1] == scales:
                raise ValueError(
                    "ip_adapter_masks: expected (1, images, height, width) with as many images as the prompt and "
                    f"scales; got {tuple(mask.shape)}, {tokens.shape[1]} images and {scales} scales. "
                    "IPAdapterMaskProcessor prepares masks."
                )
        return masks


keep_signature(SlicemodIPAdapterAttnProcessor)


def slice_ip_adapter(processor: Any, slicing: SliceConfig) -> SlicemodIPAdapterAttnProcessor:
    """Make a processor of IP-Adapter compute within a memory budget. It stays the same object with the same weights."""
    processor.replaced = type(processor)
    processor.slicing, processor.plan = slicing, None
    processor.__class__ = SlicemodIPAdapterAttnProcessor
    sliced: SlicemodIPAdapterAttnProcessor = processor
    return sliced
