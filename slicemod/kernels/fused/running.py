"""Running PyTorch's fused attention so that nothing else can run in its place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slicemod.kernels.kernel import Arguments, Inputs
from slicemod.torch_internals import fused_choice
from slicemod.watched import is_watched

# "math" is left out: it would materialise the scores that a plan promises not to.
BACKENDS = {
    "cpu": [SDPBackend.FLASH_ATTENTION],
    "cuda": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
}
_CHOICES = {device: {backend.value for backend in backends} for device, backends in BACKENDS.items()}


def fused_attention(inputs: Inputs, more: Arguments) -> Tensor:
    """`F.scaled_dot_product_attention` by a fused kernel; `(B, H, N, D)` in and out.

    Raises:
        RuntimeError: PyTorch has no fused kernel for these inputs after all.
    """
    # To ask what PyTorch is about to choose costs a tenth of seeing to it that it has no other choice.
    query, key, value, _ = inputs
    if not is_watched(query, key, value) and is_fused(pytorchs_choice(inputs, more), query):
        return sdpa(inputs, more)
    with sdpa_kernel(BACKENDS[query.device.type]):
        return sdpa(inputs, more)


def sdpa(inputs: Inputs, more: Arguments) -> Tensor:
    """`F.scaled_dot_product_attention` by whatever PyTorch takes."""
    return F.scaled_dot_product_attention(
        *inputs, more.dropout_p, more.is_causal, scale=more.scale, enable_gqa=more.enable_gqa
    )


def pytorchs_choice(inputs: Inputs, more: Arguments) -> int:
    """The value of the `SDPBackend` that `F.scaled_dot_product_attention` runs, as PyTorch is set now."""
    return fused_choice(*inputs, more.dropout_p, more.is_causal, scale=more.scale, enable_gqa=more.enable_gqa)


def is_fused(choice: int | None, query: Tensor) -> bool:
    """What `pytorchs_choice` answered is a fused kernel of the query's device."""
    return choice in _CHOICES[query.device.type]
