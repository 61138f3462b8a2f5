"""The operators `slicemod::native_attention` and its backward pass, which call the library that `build.py` compiles."""

from typing import Any

import torch
from torch import Tensor

from slicemod.kernels.backward import fake_gradients, formula_of, gradients_by, save_for_backward
from slicemod.kernels.native.binding import NativeCall, NativeLibrary
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.outputs import empty_gradients, empty_heads
from slicemod.kernels.retry import with_fewer_threads
from slicemod.operator import operator


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


def empty_row_sums(query: Tensor, keep: bool) -> Tensor:
    """An uninitialised `(2, B, H, N)` for two numbers of each row of `query`; without `keep` an empty tensor."""
    return query.new_empty((2, *query.shape[:3]) if keep else 0, dtype=torch.float32)


@operator("slicemod::native_attention")
def native_attention(  # noqa: PLR0913 - PyTorch wants the schema of an operator flat
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
    """Attention by the library; the arguments are those of `NativeCall`.

    Returns:
        The output `(B, H, N, Dv)`. With `keep` also the two numbers of each row that the backward pass needs,
        `(2, B, H, N)`; otherwise an empty tensor.
    """
    output = empty_heads(query, value.shape[3])
    row_sums = empty_row_sums(query, keep)
    kept = row_sums if keep else None
    library = required_library()
    call = NativeCall(query, key, value, mask, seed, dropout_p, is_causal, scale)
    with_fewer_threads(lambda threads: library.forward(call, output, kept, threads), torch.get_num_threads())
    return output, row_sums


@native_attention.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(query, value.shape[3]), empty_row_sums(query, settings[-1])


@operator("slicemod::native_attention_backward")
def native_attention_backward(  # noqa: PLR0913 - PyTorch wants the schema of an operator flat
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    row_sums: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mask. `needs` says which; the others have no elements."""
    gradients = empty_gradients(query, key, value, mask, (needs[0], needs[1], needs[2], needs[3]))
    wanted = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    library = required_library()
    call = NativeCall(query, key, value, mask, seed, dropout_p, is_causal, scale)
    with_fewer_threads(
        lambda threads: library.backward(grad_output, call, output, row_sums, wanted, threads), torch.get_num_threads()
    )
    return gradients


native_attention_backward.register_fake(fake_gradients)


native_gradients = gradients_by(native_attention_backward, formula_of)
native_attention.register_autograd(native_gradients, setup_context=save_for_backward)
