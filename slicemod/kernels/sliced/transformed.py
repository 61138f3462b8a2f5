"""The sliced kernel under `torch.func.grad`, `vjp` and `jacrev`, which do not accept custom operators with gradients.

Each pass is an autograd function in the form that `torch.func` requires. The backward pass is computed in slices too. A
second derivative is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slicemod.kernels.sliced.operators import attention, attention_backward


def transformed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seed: Tensor | None, *settings: Any
) -> Tensor:
    """`slicemod::attention` without kept weights; `settings` are its other arguments, in its order."""
    output: Tensor = _Attention.apply(query, key, value, mask, seed, *settings)
    return output


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        *arguments, items, heads, rows, keys = inputs
        output: Tensor = attention(*arguments, False, items, heads, rows, keys)[0]
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, value, mask, seed, *ctx.settings = inputs
        ctx.save_for_backward(query, key, value, mask, seed)
        ctx.wanted = [mask is not None and mask.is_floating_point()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needs = [True, True, True, *ctx.wanted]
        found = _Backward.apply(needs, gradients[0], *ctx.saved_tensors, *ctx.settings)
        grad_mask = found[3] if needs[3] else None
        return (*found[:3], grad_mask, None, *[None] * len(ctx.settings))


class _Backward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(needs: list[bool], *inputs: Any) -> tuple[Tensor, ...]:
        grad_output, query, key, value, mask, seed, *settings = inputs
        kept = query.new_empty(0)
        gradients: tuple[Tensor, ...] = attention_backward(
            grad_output, query, key, value, mask, seed, kept, *settings, needs
        )
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "torch.func: expected at most a first derivative of sliced attention; got a second one. Take "
            "backward(create_graph=True) without torch.func, which has them."
        )


def _one_after_another(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule by which `torch.vmap` runs an operator: once for each item of the batch, with the same slices."""

    def batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def of(item: int) -> list[Any]:
            return [
                argument if dim is None or not isinstance(argument, Tensor) else argument.select(dim, item)
                for argument, dim in zip(arguments, in_dims, strict=True)
            ]

        outputs = zip(*(operator(*of(item)) for item in range(info.batch_size)), strict=True)
        stacked = tuple(torch.stack(list(parts)) for parts in outputs)
        return stacked, tuple(0 for _ in stacked)

    return batched


attention.register_vmap(_one_after_another(attention))
attention_backward.register_vmap(_one_after_another(attention_backward))
