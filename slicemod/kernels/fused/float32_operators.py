"""PyTorch's flash attention for inputs in half precision, computed in float32.

It is for CPUs that have no instructions to multiply half precision. There PyTorch multiplies matrices in half precision
tens of times slower than in float32, in its flash kernel too, and above all in the backward pass. Some heads at a time
are converted, so that no input exists twice as a whole.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slicemod.kernels.backward import fake_gradients, gradients_by
from slicemod.kernels.outputs import empty_gradients, empty_heads
from slicemod.kernels.second_order import Formula
from slicemod.operator import operator
from slicemod.torch_internals import cpu_flash_attention_backward, cpu_flash_attention_operator


def _turns(query: Tensor, heads: int) -> Iterator[tuple[slice, slice]]:
    """The batch item and the heads of each turn, as slices, so that the tensors of a turn have 4 dimensions."""
    for item in range(query.shape[0]):
        for first in range(0, query.shape[1], heads):
            yield slice(item, item + 1), slice(first, min(first + heads, query.shape[1]))


def _additive(mask: Tensor | None, turn: tuple[slice, slice]) -> Tensor | None:
    """The part of a 4-D mask for one turn, as float32 numbers that are added to the scores."""
    if mask is None:
        return None
    item, heads = (part if size > 1 else slice(None) for part, size in zip(turn, mask.shape[:2], strict=True))
    part = mask[item, heads]
    if part.dtype != torch.bool:
        return part.float()
    return torch.full_like(part, -math.inf, dtype=torch.float32).masked_fill_(part, 0)


@operator("slicemod::float32_flash")
def float32_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of query `(B, H, N, D)`, key and value `(B, H, M, D)`, `heads` heads at a time.

    Returns:
        The output `(B, H, N, D)`. With `keep` also the log-sum-exp of each row, `(B, H, N)`; otherwise an empty tensor.
    """
    output = empty_heads(query, value.shape[3])
    logsumexp = query.new_empty(query.shape[:3] if keep else 0, dtype=torch.float32)
    for turn in _turns(query, heads):
        part, sums = cpu_flash_attention_operator(
            query[turn].float(),
            key[turn].float(),
            value[turn].float(),
            0.0,
            is_causal,
            attn_mask=_additive(mask, turn),
            scale=scale,
        )
        output[turn] = part
        if keep:
            logsumexp[turn] = sums
        del part, sums  # frees them before the next turn allocates its own
    return output, logsumexp


@float32_flash.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    kept = query.shape[:3] if settings[-1] else (0,)
    return empty_heads(query, value.shape[3]), query.new_empty(kept, dtype=torch.float32)


@operator("slicemod::float32_flash_backward")
def _float32_flash_backward(  # noqa: PLR0913 - PyTorch wants the schema of an operator flat
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
    heads: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key and value that `needs` asks for. The mask gets none."""
    need_query, need_key, need_value, _ = needs
    gradients = empty_gradients(query, key, value, None, (need_query, need_key, need_value, False))
    for turn in _turns(query, heads):
        parts = cpu_flash_attention_backward(
            *(tensor[turn].float() for tensor in (grad_output, query, key, value, output)),
            logsumexp[turn].contiguous(),
            0.0,
            is_causal,
            attn_mask=_additive(mask, turn),
            scale=scale,
        )
        for gradient, part, needed in zip(gradients, parts, needs, strict=False):
            if needed:
                gradient[turn] = part
        del parts, part
    return gradients


_float32_flash_backward.register_fake(fake_gradients)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, *settings, _keep = inputs
    ctx.save_for_backward(query, key, value, mask, *output)
    ctx.settings = settings
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _formula(is_causal: bool, scale: float, _heads: int) -> Formula:
    return Formula(scale, is_causal)


float32_flash.register_autograd(gradients_by(_float32_flash_backward, _formula), setup_context=_save_for_backward)
