"""The operators `slicemod::bf16_attention` and its backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slicemod.bf16_kernel import bf16_backward, bf16_forward
from slicemod.double_backward import differentiable_gradients
from slicemod.math_kernel import Call, empty_gradients, empty_heads
from slicemod.out_of_memory import with_smaller_slices


def _call(scale: float, heads: int, rows: int) -> Call:
    return Call(0.0, False, scale, True, heads, rows, None)


@torch.library.custom_op("slicemod::bf16_attention", mutates_args=())
def bf16_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, heads: int, rows: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention by `bf16_forward`, in turns of `heads` by `rows`, or of fewer where the device runs out of memory."""
    return with_smaller_slices(
        lambda call: bf16_forward(query, key, value, call, keep=keep),
        _call(scale, heads, rows),
        query.shape[2],
        query.device,
    )


@bf16_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, scale: float, heads: int, rows: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = query.shape[:3] if keep else (0,)
    return empty_heads(query, value.shape[3]), query.new_empty(kept), query.new_empty(kept, dtype=torch.float32)


@torch.library.custom_op("slicemod::bf16_attention_backward", mutates_args=())
def _bf16_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    shifts: Tensor,
    inverse_sums: Tensor,
    scale: float,
    heads: int,
    rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = (needs[0], needs[1], needs[2])
    return with_smaller_slices(
        lambda call: bf16_backward(grad_output, query, key, value, output, shifts, inverse_sums, call, wanted),
        _call(scale, heads, rows),
        query.shape[2],
        query.device,
    )


@_bf16_attention_backward.register_fake
def _(_grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_query, need_key, need_value = rest[-1]
    return empty_gradients(query, key, value, None, (need_query, need_key, need_value, False))[:3]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, scale, heads, rows, _keep = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.settings = scale, heads, rows
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    scale, heads, rows = ctx.settings
    grads: Sequence[Tensor | None] = (None, None, None)
    if grad_output is not None and torch.is_grad_enabled():  # backward(create_graph=True)
        query, key, value, *_ = ctx.saved_tensors
        call = _call(scale, heads, rows)
        grads = differentiable_gradients(grad_output, query, key, value, None, call, (*needs, False))[:3]
    elif grad_output is not None:
        grads = _bf16_attention_backward(grad_output, *ctx.saved_tensors, scale, heads, rows, list(needs))
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None, None, None)


bf16_attention.register_autograd(_gradients, setup_context=_save_for_backward)
