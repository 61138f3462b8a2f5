"""A feed-forward in chunks as one operator of a traced graph.

A compiler that sees the loop unrolls it, and in training computes the chunks of the backward pass in an order of its
own, with many of them in memory at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slicemod.feed_forward.gates import Gate
from slicemod.operator import operator


@operator("slicemod::feed_forward")
def feed_forward(
    tokens: Tensor, weights: list[Tensor], biases: list[Tensor], curve: str, gated: bool, chunk: int
) -> Tensor:
    """`(T, C')` of `(T, C)`: projection, gate, projection, for `chunk` tokens at a time.

    `weights` are those of both projections; `biases` too, or none at all.
    """
    gate = Gate(curve, gated)
    output = tokens.new_empty(len(tokens), len(weights[1]))
    for rows in _chunks(tokens, chunk):
        # In one expression: a name would hold the chunk until the next one is computed.
        output[rows] = _project(gate(_project(tokens[rows], weights[0], biases[:1])), weights[1], biases[1:])
    return output


@operator("slicemod::feed_forward_gradients")
def feed_forward_gradients(
    grad_output: Tensor,
    tokens: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    curve: str,
    gated: bool,
    chunk: int,
    trains: bool,
) -> list[Tensor]:
    """The gradients of tokens, and of weights and biases if they are trained. Each chunk is computed once more."""
    gate, first, second = Gate(curve, gated), weights[0], weights[1]
    grads = [torch.zeros_like(given) for given in (*weights, *biases)] if trains else []
    grad_tokens = torch.empty_like(tokens)
    for rows in _chunks(tokens, chunk):
        given, grad = tokens[rows], grad_output[rows]
        projected = _project(given, first, biases[:1])
        if trains:
            grads[1].addmm_(grad.t(), gate(projected))
        grad_projected = gate.gradient(grad @ second, projected)
        del projected
        if trains:
            grads[0].addmm_(grad_projected.t(), given)
            for total, part in zip(grads[2:], (grad_projected, grad), strict=False):
                total += part.sum(0)
        torch.mm(grad_projected, first, out=grad_tokens[rows])
        del grad_projected
    return [grad_tokens, *grads]


def _chunks(tokens: Tensor, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, len(tokens), chunk)]


def _project(x: Tensor, weight: Tensor, bias: list[Tensor]) -> Tensor:
    return torch.addmm(bias[0], x, weight.t()) if bias else x @ weight.t()


@feed_forward.register_fake
def _(tokens: Tensor, weights: list[Tensor], biases: list[Tensor], curve: str, gated: bool, chunk: int) -> Tensor:
    return tokens.new_empty(len(tokens), len(weights[1]))


@feed_forward_gradients.register_fake
def _(grad_output: Tensor, tokens: Tensor, weights: list[Tensor], biases: list[Tensor], *settings: Any) -> list[Tensor]:
    trains = settings[-1]
    return [torch.empty_like(tokens), *(torch.empty_like(given) for given in (*weights, *biases) if trains)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weights, biases, *settings = inputs
    ctx.save_for_backward(tokens, *weights, *biases)
    ctx.settings = settings
    ctx.trains = any(given.requires_grad for given in (*weights, *biases))


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    tokens, first, second, *biases = ctx.saved_tensors
    grads = feed_forward_gradients(grad_output.contiguous(), tokens, [first, second], biases, *ctx.settings, ctx.trains)
    found = grads[1:] if ctx.trains else [None] * (2 + len(biases))
    return grads[0], found[:2], found[2:], None, None, None


feed_forward.register_autograd(_gradients, setup_context=_keep)
