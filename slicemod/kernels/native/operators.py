"""The operators `slicemod::native_attention` and its backward pass, which call the library that `build.py` compiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slicemod.kernels.attention_operators import AttentionCall, attention_operators
from slicemod.kernels.native.binding import NUMBERS, NativeLibrary
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.retry import with_fewer_threads


def required_library() -> NativeLibrary:
    """The library of this machine.

    Raises:
        RuntimeError: there is none, though a plan or a graph of another machine asks for it.
    """
    library = native_library()
    if library is None:
        raise RuntimeError(
            f"native attention: expected the machine that it was planned for; on this one, {native_obstacle()}. "
            "Trace, export or plan it again here."
        )
    return library


def _forward(call: AttentionCall, output: Tensor, row_sums: Tensor | None) -> None:
    library = required_library()
    with_fewer_threads(lambda threads: library.forward(call, output, row_sums, threads), torch.get_num_threads())


def _backward(
    grad_output: Tensor, call: AttentionCall, output: Tensor, row_sums: Tensor, gradients: Sequence[Tensor | None]
) -> None:
    library = required_library()
    with_fewer_threads(
        lambda threads: library.backward(grad_output, call, output, row_sums, gradients, threads),
        torch.get_num_threads(),
    )


native_attention, native_gradients = attention_operators("native_attention", NUMBERS, _forward, _backward)
