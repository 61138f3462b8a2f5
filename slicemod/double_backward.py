"""Gradients that can be differentiated again, for `backward(create_graph=True)` through the sliced kernel.

They are rare enough to be taken unsliced: a second derivative keeps the memory that full attention takes.
"""

import math

import torch
from einops import rearrange
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
    tensors = zip((query, key, value, mask), needs, strict=True)
    inputs = [tensor for tensor, needed in tensors if needed and tensor is not None]
    found = iter(torch.autograd.grad(output, inputs, grad_output, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: Call) -> Tensor:
    dtype = torch.float32 if call.upcast and query.dtype.itemsize < 4 else query.dtype
    query_of_key = rearrange(query.to(dtype), "b (k g) n d -> b k g n d", k=key.shape[1])
    scores = torch.einsum("bkgnd, bkmd -> bkgnm", call.scale * query_of_key, key.to(dtype)).flatten(1, 2)
    if call.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
    if mask is not None:
        scores = scores + mask
    dead_rows = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead_rows, 0), -1).masked_fill(dead_rows, 0)
    weights = rearrange(weights, "b (k g) n m -> b k g n m", k=key.shape[1])
    output = torch.einsum("bkgnm, bkmd -> bkgnd", weights, value.to(dtype))
    return output.flatten(1, 2).to(query.dtype)
