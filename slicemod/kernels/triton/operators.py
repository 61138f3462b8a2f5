"""The operators `slicemod::triton_attention` and its backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slicemod.kernels.attention_operators import AttentionCall, attention_operators
from slicemod.kernels.plain_memory import readable
from slicemod.kernels.triton.present import architecture_of


def _forward(call: AttentionCall, output: Tensor, sums: Tensor | None) -> None:
    """`sums` are the log-sum-exp of each row."""
    from slicemod.kernels.triton.launches import Call, forward_launch, run  # imports Triton

    given = Call(*call.with_each(lambda _, tensor: readable(tensor)))
    run([forward_launch(given, output, sums, architecture_of(output.device))], output.device)


def _backward(
    grad_output: Tensor, call: AttentionCall, output: Tensor, sums: Tensor, gradients: Sequence[Tensor | None]
) -> None:
    from slicemod.kernels.triton.launches import BackwardCall, Call, backward_launches, run  # imports Triton

    given = Call(*call.with_each(lambda _, tensor: readable(tensor)))
    known = BackwardCall(readable(grad_output), output, sums, gradients)
    run(backward_launches(given, known, architecture_of(output.device)), output.device)


triton_attention, _ = attention_operators("triton_attention", (), _forward, _backward)
