"""Gradients that can be differentiated again, for `backward(create_graph=True)` through any kernel.

They are rarely needed, so they are computed without slices, in as much memory as full attention takes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from slicemod.call import scale_of
from slicemod.kernels.kernel import Arguments, Inputs


class Formula(NamedTuple):
    """The settings of attention that its derivatives depend on.

    Attributes:
        scale: factor of the scores.
        is_causal: query `i` sees keys `0..i`.
        upcast: scores of half precision are computed in float32.
        dropout_p: probability of dropping a weight.
    """

    scale: float
    is_causal: bool = False
    upcast: bool = True
    dropout_p: float = 0.0


def differentiable_gradients(
    grad_output: Tensor, inputs: Inputs, formula: Formula, needs: tuple[bool, bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients of query, key, value and mask as functions of all inputs. Those that `needs` leaves out are None.

    Raises:
        NotImplementedError: with dropout, because each slice draws its own random numbers.
    """
    if formula.dropout_p > 0:
        raise NotImplementedError(
            f"dropout_p: expected 0 where second derivatives are asked for; got {formula.dropout_p}. Leave "
            "create_graph out, or the dropout."
        )
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed and tensor is not None]
    found = iter(torch.autograd.grad(_attention(inputs, formula), wanted, grad_output, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _attention(inputs: Inputs, formula: Formula) -> Tensor:
    query, key, value, mask = inputs
    dtype = torch.float32 if formula.upcast and query.dtype.itemsize < 4 else query.dtype
    query_of_key = rearrange(query.to(dtype), "b (k g) n d -> b k g n d", k=key.shape[1])
    scores = torch.einsum("bkgnd, bkmd -> bkgnm", formula.scale * query_of_key, key.to(dtype)).flatten(1, 2)
    if formula.is_causal:
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


def with_second_derivatives(output: Tensor, inputs: Inputs, more: Arguments) -> Tensor:
    """The output of PyTorch's fused attention, made so that its gradients can be differentiated again.

    `backward()` goes through PyTorch's kernel as before, and no more tensors are kept for it. Only
    `backward(create_graph=True)` computes the gradients by the formula above, because those of PyTorch's kernel cannot
    be differentiated.
    """
    query = inputs[0]
    formula = Formula(scale_of(query, more.scale), more.is_causal, dropout_p=more.dropout_p)
    result: Tensor = _TwiceDifferentiable.apply(output, formula, *inputs)
    return result


class _TwiceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, formula: Formula, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.formula = formula
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return (grad_outputs[0], *[None] * 5)  # on to the backward pass of PyTorch's kernel
        needs = ctx.needs_input_grad[2:]
        return None, None, *differentiable_gradients(grad_outputs[0], ctx.saved_tensors, ctx.formula, needs)
