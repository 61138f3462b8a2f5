"""Native attention of calls that are known: everything but the addresses of the tensors is prepared.

The operators describe a call to the library each time, which takes as long as the attention of some dozens of tokens.
What is prepared here must be called only if nothing watches the operators. A call that the library cannot read, or that
runs out of memory, goes to the operators. So does a backward pass whose tensors are not as they were saved: what packs
saved tensors, such as `save_on_cpu`, may give them back with other strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from slicemod.kernels.attention_operators import AttentionCall
from slicemod.kernels.kernel import Run
from slicemod.kernels.native.binding import NUMBERS, Prepared
from slicemod.kernels.native.operators import native_attention, native_gradients, required_library
from slicemod.kernels.outputs import empty_heads
from slicemod.kernels.retry import ran_out
from slicemod.watched import is_watched

_GRADIENT_LAYOUTS = 16  # for how many layouts of the output's gradient a call is prepared; there are few


def prepared_inference(call: AttentionCall) -> Run:
    """A function that does `native_attention` without gradients, for any inputs with these sizes, strides and dtypes.

    The call has no dropout.
    """
    call = _without_memory(call)
    like_output = empty_heads(call.query, call.value.shape[3])
    sizes, strides = like_output.shape, like_output.stride()
    settings = None, 0.0, call.is_causal, call.scale, False
    forward = required_library().prepared_forward(call, like_output, None, torch.get_num_threads())

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty_strided(sizes, strides)
        if _ran(forward, query, key, value, mask, None, output, None):
            return output
        del output
        return native_attention(query, key, value, mask, *settings)[0]  # type: ignore[no-any-return]

    return attend


def prepared_training(call: AttentionCall) -> Run:
    """The same with gradients of query, key and value. The call has no mask that needs a gradient."""
    known = _KnownTraining(_without_memory(call))

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = _Training.apply(query, key, value, mask, known)
        return output

    return attend


class _KnownTraining:
    """Both passes of a known call, which is given with tensors that have no memory."""

    def __init__(self, call: AttentionCall) -> None:
        self.settings = 0.0, call.is_causal, call.scale
        library, threads = required_library(), torch.get_num_threads()
        output = empty_heads(call.query, call.value.shape[3])
        row_sums = call.query.new_empty((*NUMBERS, *call.query.shape[:3]), dtype=torch.float32)
        self._sizes, self._strides, self._row_sums = output.shape, output.stride(), row_sums.shape
        self._forward = library.prepared_forward(call, output, row_sums, threads)
        gradients = [empty_heads(tensor, tensor.shape[3]) for tensor in (call.query, call.key, call.value)]
        self._gradients = [(gradient.shape, gradient.stride()) for gradient in gradients]
        self._saved = call.query, call.key, call.value, call.mask, None, output, row_sums

        @lru_cache(_GRADIENT_LAYOUTS)
        def backward(strides: tuple[int, ...], needs: tuple[bool, ...]) -> Prepared:
            grad_output = output.new_empty_strided(output.shape, strides)
            wanted = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
            return library.prepared_backward(grad_output, call, output, row_sums, [*wanted, None], threads)

        self._backward = backward

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, and the two numbers of each row."""
        output = query.new_empty_strided(self._sizes, self._strides)
        row_sums = query.new_empty(self._row_sums, dtype=torch.float32)
        if _ran(self._forward, query, key, value, mask, None, output, row_sums):
            return output, row_sums
        del output, row_sums
        return native_attention(query, key, value, mask, None, *self.settings, True)  # type: ignore[no-any-return]

    def backward(
        self, grad_output: Tensor, saved: Sequence[Tensor | None], needs: tuple[bool, ...]
    ) -> list[Tensor | None] | None:
        """The gradients of query, key and value that are needed. None if the operator has to compute them."""
        if not all(map(_is_like, saved, self._saved)):
            return None
        gradients = [
            grad_output.new_empty_strided(*layout) if needed else None
            for layout, needed in zip(self._gradients, needs, strict=True)
        ]
        delta = grad_output.new_empty(self._row_sums[1:], dtype=torch.float32)
        run = self._backward(grad_output.stride(), needs)
        return gradients if _ran(run, grad_output, *saved, *gradients, None, delta) else None


class _Training(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, known: _KnownTraining
    ) -> Tensor:
        output, row_sums = known.forward(query, key, value, mask)
        # The operator saves the same, in this order. A checkpoint compares what two runs of a call save.
        ctx.save_for_backward(query, key, value, mask, None, output, row_sums)
        ctx.known = known
        ctx.settings = known.settings
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        if grad_output is not None and not torch.is_grad_enabled() and not is_watched(grad_output):
            gradients = ctx.known.backward(grad_output, ctx.saved_tensors, ctx.needs_input_grad[:3])
            if gradients is not None:
                return (*gradients, None, None)
        return (*native_gradients(ctx, grad_output, None)[:4], None)


def _is_like(tensor: Tensor | None, like: Tensor | None) -> bool:
    """Whether a tensor on the CPU has the sizes, strides and dtype of another; None is like None."""
    if tensor is None or like is None:
        return tensor is like
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.is_cpu
        and tensor.dtype == like.dtype
        and tensor.shape == like.shape
        and tensor.stride() == like.stride()
    )


def _ran(run: Prepared, *tensors: Tensor | None) -> bool:
    """Whether the library could read the tensors, and had the memory that it needs."""
    try:
        return run(*tensors)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return False


def _without_memory(call: AttentionCall) -> AttentionCall:
    """The same call with tensors on the device "meta": what is remembered must not keep a call's tensors alive."""

    def like(_name: str, tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    return call.with_each(like)
