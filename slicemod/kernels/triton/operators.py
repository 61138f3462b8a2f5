"""The operators `slicemod::triton_attention` and its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slicemod.kernels.backward import fake_gradients, formula_of, gradients_by, save_for_backward
from slicemod.kernels.outputs import empty_gradients, empty_heads
from slicemod.kernels.triton.present import architecture_of
from slicemod.operator import operator


@operator("slicemod::triton_attention")
def triton_attention(  # noqa: PLR0913 - PyTorch wants the schema of an operator flat
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
    """Attention of query `(B, H, N, D)`, key `(B, Hk, M, D)`, value `(B, Hk, M, Dv)`.

    Returns:
        The output `(B, H, N, Dv)`. With `keep` also the log-sum-exp of each row, `(B, H, N)`; otherwise an empty
        tensor.
    """
    from slicemod.kernels.triton.launches import Call, forward_launch, run  # imports Triton

    output, sums = _results(query, value, keep)
    call = Call(query, key, value, mask, seed, dropout_p, is_causal, scale).readable()
    run([forward_launch(call, output, sums if keep else None, architecture_of(query.device))], query.device)
    return output, sums


def _results(query: Tensor, value: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    sums = query.new_empty(query.shape[:3] if keep else 0, dtype=torch.float32)
    return empty_heads(query, value.shape[3]), sums


@triton_attention.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _results(query, value, settings[-1])


@operator("slicemod::triton_attention_backward")
def _triton_attention_backward(  # noqa: PLR0913 - PyTorch wants the schema of an operator flat
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
    """Gradients of query, key, value and mask. `needs` says which; the others have no elements."""
    from slicemod.kernels.triton.launches import BackwardCall, Call, backward_launches, readable, run  # imports Triton

    gradients = empty_gradients(query, key, value, mask, (needs[0], needs[1], needs[2], needs[3]))
    wanted = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    call = Call(query, key, value, mask, seed, dropout_p, is_causal, scale).readable()
    given = BackwardCall(readable(grad_output), output, sums, wanted)
    run(backward_launches(call, given, architecture_of(query.device)), query.device)
    return gradients


_triton_attention_backward.register_fake(fake_gradients)


triton_attention.register_autograd(
    gradients_by(_triton_attention_backward, formula_of), setup_context=save_for_backward
)
