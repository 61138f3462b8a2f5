"""The backward pass of a kernel that is an operator: what autograd calls, and the fake of the operator behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slicemod.kernels.outputs import empty_gradients
from slicemod.kernels.second_order import Formula, differentiable_gradients

Gradients = Callable[[Any, Tensor | None, Tensor | None], tuple[Tensor | None, ...]]


def fake_gradients(
    _grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fake of a backward operator, whose last argument says which of the four gradients are needed."""
    need_query, need_key, need_value, need_mask = settings[-1]
    return empty_gradients(query, key, value, mask, (need_query, need_key, need_value, need_mask))


def gradients_by(backward: Callable[..., Sequence[Tensor]], formula: Callable[..., Formula]) -> Gradients:
    """What autograd calls for an operator of query, key, value, mask and more.

    The operator's context has saved query, key, value and mask, then what else the backward operator takes; its
    settings are `settings`.

    Args:
        backward: the backward operator, of the gradient of the output, the saved tensors, the settings and which
            gradients are needed.
        formula: makes of the settings the formula for gradients that can be differentiated again.
    """

    def gradients(ctx: Any, grad_output: Tensor | None, _grad_kept: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        grads: Sequence[Tensor | None] = [None] * 4
        if grad_output is not None and torch.is_grad_enabled():  # backward(create_graph=True)
            query, key, value, mask, *_ = ctx.saved_tensors
            grads = differentiable_gradients(grad_output, (query, key, value, mask), formula(*ctx.settings), needs)
        elif grad_output is not None:
            grads = backward(grad_output, *ctx.saved_tensors, *ctx.settings, list(needs))
        wanted = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return (*wanted, *[None] * (len(ctx.needs_input_grad) - 4))

    return gradients
