"""Whether PyTorch fuses a call, asked with its tensors."""

from __future__ import annotations

from torch import Tensor

from slicemod.call import needs_grad
from slicemod.dispatch import call_spec, describe
from slicemod.kernels.fused import obstacles
from slicemod.kernels.fused.obstacles import layout_of
from slicemod.kernels.kernel import Arguments
from slicemod.layers.inputs import as_four_dims


def fused_obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> str | None:
    """What is said of a call with these tensors."""
    arguments = Arguments(dropout_p, is_causal, None, enable_gqa)
    layout = layout_of((query, key, value, attn_mask), arguments)
    inputs = as_four_dims(query, key, value, attn_mask, enable_gqa)
    arguments = arguments._replace(training=needs_grad(*inputs))
    return obstacles.fused_obstacle(call_spec(*describe(inputs, arguments, layout)))
