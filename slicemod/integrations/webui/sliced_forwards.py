"""`forward` of the webui's CrossAttention and AttnBlock, of LDM and sgm, with slicemod's attention."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from einops import rearrange
from torch import Tensor

from slicemod.adapters.attn_block import attended_block
from slicemod.attention import apply_key_mask
from slicemod.functional import sliced_attention
from slicemod.integrations.webui.settings import slicing


def cross_attention_forward(
    self: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **more: Any
) -> Tensor:
    """Attention of `x`, `(B, N, C)`, to `context`, `(B, M, Cc)`, after the hypernetworks that are loaded.

    Args:
        self: the layer.
        x: the queries.
        context: the keys and values; `x` when left out.
        mask: bool, `(B, M)` or more dimensions after the first that have M elements, True for keys that count.
        more: what Stability's video models pass besides. The webui has no attention for that.

    Raises:
        ValueError: `more` asks for something.
        NotEnoughMemoryError: no plan fits the budget.
    """
    asked = [name for name, value in more.items() if value is not None and value is not False and value != 0]
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: expected none, as the webui's attention leaves it out; got a value. Choose another "
            "attention optimization for this model."
        )
    context = x if context is None else context
    shared = import_module("modules.shared")
    hypernetwork = import_module("modules.hypernetworks.hypernetwork")
    for_keys, for_values = hypernetwork.apply_hypernetworks(shared.loaded_hypernetworks, context)
    query, key, value = (
        rearrange(projected, "b n (h d) -> b h n d", h=self.heads)
        for projected in (self.to_q(x), self.to_k(for_keys), self.to_v(for_values))
    )
    del context, for_keys, for_values
    if mask is not None:
        query, mask = apply_key_mask(query, mask)
    output = rearrange(_attend(query, key, value, mask, self.scale), "b h n d -> b n (h d)")
    projected: Tensor = self.to_out(output)
    return projected


def attn_block_forward(self: Any, x: Tensor, **_unused: Any) -> Tensor:
    """The VAE's attention: every pixel of `x`, `(B, C, height, width)`, attends to all pixels.

    Raises:
        NotEnoughMemoryError: no plan fits the budget.
    """
    return attended_block(self, x, lambda query, key, value: _attend(query, key, value, None, None))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention with the webui's setting "Upcast cross attention layer to float32"."""
    upcast, dtype = import_module("modules.shared").opts.upcast_attn, query.dtype
    if upcast:
        query, key, value = query.float(), key.float(), value.float()
    with import_module("modules.devices").without_autocast(disable=not upcast):
        return sliced_attention(query, key, value, mask, scale=scale, slicing=slicing()).to(dtype)
