"""Gradients that can be differentiated again, for `backward(create_graph=True)` through the sliced kernel.

They are rare enough to be taken unsliced: a second derivative keeps the memory that full attention takes.
"""

import math

import torch
from torch import Tensor

from slicemod.math_kernel import Call


def differentiable_gradients(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    call: Call,
    needs: tuple[bool, bool, bool, bool],
) -> list[Tensor | None]:
    """Gradients of query, key, value and mask, those that `needs` names, as functions of all inputs.

    Raises:
        NotImplementedError: with dropout, whose draw belongs to the slices.
    """
    if call.dropout_p > 0:
        raise NotImplementedError(
            f"dropout_p: expected 0 where second derivatives are asked for; got {call.dropout_p}. Leave create_graph "
            "out, or the dropout."
        )
    output = _attention(query, key, value, mask, call)
    inputs = [tensor for tensor, needed in zip((query, key, value, mask), needs, strict=True) if needed]
    found = iter(torch.autograd.grad(output, inputs, grad_output, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: Call) -> Tensor:
    dtype = torch.float32 if call.upcast and query.dtype.itemsize < 4 else query.dtype
    grouped = query.to(dtype).unflatten(1, (key.shape[1], -1))  # (B, Hk, H / Hk, N, D)
    scores = call.scale * grouped @ key.to(dtype).unsqueeze(2).transpose(-1, -2)  # (B, Hk, H / Hk, N, M)
    scores = scores.flatten(1, 2)
    if call.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
    if mask is not None:
        scores = scores + mask
    dead_rows = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead_rows, 0), -1).masked_fill(dead_rows, 0)
    output = weights.unflatten(1, (key.shape[1], -1)) @ value.to(dtype).unsqueeze(2)
    return output.flatten(1, 2).to(query.dtype)
