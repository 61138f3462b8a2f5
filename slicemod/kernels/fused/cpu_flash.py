"""PyTorch's flash attention for CPUs, called directly, for inputs for which PyTorch is known to choose it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slicemod.call import scale_of
from slicemod.kernels.second_order import Formula, differentiable_gradients
from slicemod.torch_internals import cpu_flash_attention, cpu_flash_attention_backward


def flash_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """What `fused_attention` runs on the CPU in inference without a mask."""
    return cpu_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]


def differentiable_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> Tensor:
    """The same with gradients, which have gradients as well."""
    output: Tensor = _FlashAttention.apply(query, key, value, is_causal, scale)
    return output


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
        output, logsumexp = cpu_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.settings = is_causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        is_causal, scale = ctx.settings
        if not torch.is_grad_enabled():
            found = cpu_flash_attention_backward(
                gradients[0], query, key, value, output, logsumexp, 0.0, is_causal, scale=scale
            )
            return (*found, None, None)
        needs = (*ctx.needs_input_grad[:3], False)  # backward(create_graph=True)
        formula = Formula(scale_of(query, scale), is_causal)
        return (*differentiable_gradients(gradients[0], (query, key, value, None), formula, needs)[:3], None, None)
