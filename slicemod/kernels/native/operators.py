"""The operators `slicemod::native_attention` and its backward pass, which call the library that `build.py` compiles."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slicemod.kernels.native.binding import NativeLibrary
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.outputs import empty_gradients, empty_heads
from slicemod.kernels.retry import ran_out, with_fewer_threads
from slicemod.kernels.second_order import Formula, differentiable_gradients
from slicemod.operator import operator


def _library() -> NativeLibrary:
    library = native_library()
    if library is None:
        raise RuntimeError(
            f"native attention: expected the machine that it was planned for; on this one, {native_obstacle()}. "
            "Trace, export or plan it again here."
        )
    return library


def _empty_row_sums(query: Tensor, keep: bool) -> Tensor:
    return query.new_empty((2, *query.shape[:3]) if keep else 0, dtype=torch.float32)


@operator("slicemod::native_attention")
def native_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    """Attention of query `(B, H, N, D)`, key `(B, H, M, D)` and value `(B, H, M, Dv)`, one of the library's dtypes.

    Returns:
        The output `(B, H, N, Dv)`. With `keep` also the two numbers of each row that the backward pass needs,
        `(2, B, H, N)`; otherwise an empty tensor.
    """
    output = empty_heads(query, value.shape[3])
    row_sums = _empty_row_sums(query, keep)
    kept = row_sums if keep else None
    library = _library()
    with_fewer_threads(
        lambda threads: library.forward(query, key, value, output, kept, scale, threads), torch.get_num_threads()
    )
    return output, row_sums


@native_attention.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, _scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    return empty_heads(query, value.shape[3]), _empty_row_sums(query, keep)


@operator("slicemod::native_attention_backward")
def _native_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    row_sums: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = empty_gradients(query, key, value, None, (needs[0], needs[1], needs[2], False))[:3]
    wanted = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    library = _library()
    with_fewer_threads(
        lambda threads: library.backward(grad_output, (query, key, value), output, row_sums, wanted, scale, threads),
        torch.get_num_threads(),
    )
    return gradients


@_native_attention_backward.register_fake
def _(_grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_query, need_key, need_value = rest[-1]
    return empty_gradients(query, key, value, None, (need_query, need_key, need_value, False))[:3]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, scale, _keep = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads: Sequence[Tensor | None] = (None, None, None)
    if grad_output is not None and torch.is_grad_enabled():  # backward(create_graph=True)
        query, key, value, *_ = ctx.saved_tensors
        inputs = query, key, value, None
        grads = differentiable_gradients(grad_output, inputs, Formula(ctx.scale), (*needs, False))[:3]
    elif grad_output is not None:
        grads = _native_attention_backward(grad_output, *ctx.saved_tensors, ctx.scale, list(needs))
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None)


native_attention.register_autograd(_gradients, setup_context=_save_for_backward)


def prepared_inference(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function that does `native_attention` without gradients, for any inputs with these sizes, strides and dtype.

    It must be called only if nothing watches the operators, and while PyTorch has as many threads as now.
    """
    like_output = empty_heads(query.new_empty(query.shape, device="meta"), value.shape[3])
    sizes, strides = like_output.shape, like_output.stride()
    forward = _library().prepared_forward(query, key, value, like_output, scale, torch.get_num_threads())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty_strided(sizes, strides)
        try:
            forward(query, key, value, output)
        except RuntimeError as error:
            if not ran_out(error):
                raise
        else:
            return output
        del output
        return native_attention(query, key, value, scale, False)[0]  # type: ignore[no-any-return]

    return attend
