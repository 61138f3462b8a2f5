"""Attention by a kernel of ours as a pair of operators, forward and backward, and the call that it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slicemod.call import scale_of
from slicemod.kernels.backward import Gradients, fake_gradients, gradients_by
from slicemod.kernels.kernel import Arguments, Inputs
from slicemod.kernels.outputs import empty_gradients, empty_heads
from slicemod.kernels.second_order import Formula
from slicemod.operator import Operator, operator


class AttentionCall(NamedTuple):
    """One attention call.

    Attributes:
        query: `(B, H, N, D)`. The tensors may have any strides.
        key: `(B, Hk, M, D)`, in the same dtype.
        value: `(B, Hk, M, Dv)`, in the same dtype.
        mask: bool, float32, float16 or bfloat16; each of its four sizes is 1 or that of the scores `(B, H, N, M)`.
        seed: one int64 that the dropped weights follow from; None without dropout.
        dropout_p: probability of dropping a weight.
        is_causal: query `i` sees keys `0..i`.
        scale: factor of the products, an ordinary number (`slicemod.call.has_ordinary_scale`).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    seed: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float

    @classmethod
    def of(cls, inputs: Inputs, more: Arguments) -> AttentionCall:
        """The call of a kernel's inputs, with a seed of its own where there is dropout."""
        query, key, value, mask = inputs
        seed = torch.randint(2**63 - 1, (), device=query.device) if more.dropout_p > 0 else None
        return cls(query, key, value, mask, seed, more.dropout_p, more.is_causal, scale_of(query, more.scale))

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order in which they are passed."""
        return self.query, self.key, self.value, self.mask, self.seed

    def with_each(self, change: Callable[[str, Tensor], Tensor]) -> AttentionCall:
        """The same call, each of its tensors changed by a function that is also told the tensor's name."""
        query, key, value = change("query", self.query), change("key", self.key), change("value", self.value)
        mask, seed = (
            None if (given := getattr(self, name)) is None else change(name, given) for name in ("mask", "seed")
        )
        return self._replace(query=query, key=key, value=value, mask=mask, seed=seed)


Forward = Callable[[AttentionCall, Tensor, Tensor | None], None]
Backward = Callable[[Tensor, AttentionCall, Tensor, Tensor, Sequence[Tensor | None]], None]


def attention_operators(
    name: str, numbers: tuple[int, ...], forward: Forward, backward: Backward
) -> tuple[Operator, Gradients]:
    """The operator `slicemod::{name}`, and what autograd calls for it, which calls `slicemod::{name}_backward`.

    Args:
        name: of the operator.
        numbers: what the backward pass needs of each row has the sizes `(*numbers, B, H, N)`, in float32.
        forward: writes the output `(B, H, N, Dv)` of a call, and these numbers where it is given a tensor for them.
        backward: of the output's gradient, the call, its output and these numbers. It writes the gradients of query,
            key, value and mask; those that are None are not wanted.
    """

    def empty_results(query: Tensor, value: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        sums = query.new_empty((*numbers, *query.shape[:3]) if keep else 0, dtype=torch.float32)
        return empty_heads(query, value.shape[3]), sums

    @operator(f"slicemod::{name}")
    def attention(  # noqa: PLR0913 - PyTorch wants the schema of an operator flat
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        output, sums = empty_results(query, value, keep)
        call = AttentionCall(query, key, value, mask, seed, dropout_p, is_causal, scale)
        forward(call, output, sums if keep else None)
        return output, sums

    @attention.register_fake
    def _(query: Tensor, _key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        return empty_results(query, value, settings[-1])

    @operator(f"slicemod::{name}_backward")
    def attention_backward(  # noqa: PLR0913 - PyTorch wants the schema of an operator flat
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        output: Tensor,
        sums: Tensor,
        dropout_p: float,
        is_causal: bool,
        scale: float,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gradients = empty_gradients(query, key, value, mask, (needs[0], needs[1], needs[2], needs[3]))
        wanted = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
        call = AttentionCall(query, key, value, mask, seed, dropout_p, is_causal, scale)
        backward(grad_output, call, output, sums, wanted)
        return gradients

    attention_backward.register_fake(fake_gradients)
    gradients = gradients_by(attention_backward, _formula)
    attention.register_autograd(gradients, setup_context=_save_for_backward)
    return attention, gradients


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, seed, *settings, _keep = inputs
    ctx.save_for_backward(query, key, value, mask, seed, *output)
    ctx.settings = settings
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _formula(dropout_p: float, is_causal: bool, scale: float) -> Formula:
    return Formula(scale, is_causal, dropout_p=dropout_p)
