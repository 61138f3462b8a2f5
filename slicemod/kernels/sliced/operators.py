"""The sliced kernel as operators of PyTorch.

If a compiler saw the loop over the slices, it would unroll and reorder it, and memory would grow with the number of
slices. An operator is a single node of the graph: the slices stay in order, and compile time does not depend on their
number.
"""

from typing import Any

import torch
from torch import Tensor

from slicemod.kernels.backward import fake_gradients, gradients_by
from slicemod.kernels.outputs import empty_heads
from slicemod.kernels.retry import with_smaller_slices
from slicemod.kernels.second_order import Formula
from slicemod.kernels.sliced.chunks import chunked_backward, chunked_forward
from slicemod.kernels.sliced.loop import SlicedCall, kept_shape, math_backward, math_forward
from slicemod.kernels.sliced.products import products_of
from slicemod.operator import operator


@operator("slicemod::attention")
def attention(  # noqa: PLR0913 - PyTorch wants the schema of an operator flat
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    upcast: bool,
    keep_weights: bool,
    items: int,
    heads: int,
    rows: int,
    keys: int,
) -> tuple[Tensor, Tensor]:
    """Attention of query `(B, H, N, D)`, key `(B, Hk, M, D)`, value `(B, Hk, M, Dv)` in the slices of a `SlicePlan`.

    Returns:
        The output `(B, H, N, Dv)`. With `keep_weights` also the weights `(B, H, N, M)`; otherwise an empty tensor.
    """

    def run(call: SlicedCall) -> tuple[Tensor, Tensor]:
        if 0 < call.keys < key.shape[2]:
            return chunked_forward(query, key, value, mask, call)
        return math_forward(query, key, value, mask, call, keep_weights=keep_weights)

    products = products_of(query.device.type, query.element_size(), query.shape[3])
    call = SlicedCall(dropout_p, is_causal, scale, upcast, heads, rows, seed, items, keys, products)
    return with_smaller_slices(run, call, query.shape[2], query.device)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    *_, upcast, keep_weights, _items, _heads, _rows, _keys = settings
    dtype = torch.float32 if upcast and query.dtype.itemsize < 4 else query.dtype
    kept = query.new_empty(kept_shape(query, key) if keep_weights else (0,), dtype=dtype)
    return empty_heads(query, value.shape[3]), kept


@operator("slicemod::attention_backward")
def attention_backward(  # noqa: PLR0913 - PyTorch wants the schema of an operator flat
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    kept: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    upcast: bool,
    items: int,
    heads: int,
    rows: int,
    keys: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mask, computed in the slices of the forward pass. `needs` says which."""
    wanted = (needs[0], needs[1], needs[2], needs[3])

    def run(call: SlicedCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if 0 < call.keys < key.shape[2]:
            return chunked_backward(grad_output, query, key, value, mask, call, wanted)
        return math_backward(grad_output, query, key, value, mask, kept, call, wanted)

    products = products_of(query.device.type, query.element_size(), query.shape[3])
    call = SlicedCall(dropout_p, is_causal, scale, upcast, heads, rows, seed, items, keys, products)
    return with_smaller_slices(run, call, query.shape[2], query.device)


attention_backward.register_fake(fake_gradients)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, seed, *settings, _keep_weights, items, heads, rows, keys = inputs
    ctx.save_for_backward(query, key, value, mask, seed, output[1])
    ctx.settings = (*settings, items, heads, rows, keys)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise autograd allocates a gradient of zeros for the kept weights


def _formula(dropout_p: float, is_causal: bool, scale: float, upcast: bool, *_slices: int) -> Formula:
    return Formula(scale, is_causal, upcast, dropout_p)


attention.register_autograd(gradients_by(attention_backward, _formula), setup_context=_save_for_backward)
