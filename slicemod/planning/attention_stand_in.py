"""A stand-in for PyTorch's attention, which computes nothing and records its calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slicemod.call import CallSpec, Layout, attention_shape, attention_sizes, has_ordinary_scale, upcasts
from slicemod.kernels.fused.obstacles import layout_of
from slicemod.kernels.kernel import Arguments
from slicemod.planning.memory_timeline import MemoryRecorder


class AttentionStandIn:
    """What `F.scaled_dot_product_attention` is while `installed`: its output is empty, and its gradients are too.

    Args:
        recorder: is told when a call works, and what it keeps for its backward pass.
        device_type: that the step is planned for; it decides about fused kernels and the dtype of scores.
        training: the step needs gradients.

    Attributes:
        calls: in the order in which they came; a call that is computed again for the backward pass comes twice.
    """

    def __init__(self, recorder: MemoryRecorder, device_type: str, *, training: bool = False) -> None:
        self._recorder, self._device_type, self._training = recorder, device_type, training
        self.calls: list[CallSpec] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts it in the function's place; a TorchFunctionMode would miss what backward computes again."""
        original = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self
        try:
            yield
        finally:
            F.scaled_dot_product_attention = original

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Notes the call, whose tensors are `(B, H, N, D)`, on the device "meta" or fake."""
        upcast = upcasts(self._device_type, query.element_size())
        inputs = query, key, value, attn_mask
        sizes = attention_sizes(*inputs, dropout_p=dropout_p, is_causal=is_causal, upcast=upcast)
        layout = Layout(*layout_of(inputs, Arguments(dropout_p, is_causal, scale, enable_gqa)))
        ordinary_scale, threads = has_ordinary_scale(scale), torch.get_num_threads()
        device = torch.device(self._device_type)
        # No card is given: a device that is planned for need not be there.
        self.calls.append(
            CallSpec(
                attention_shape(sizes), query.dtype, device, self._training, ordinary_scale, layout, threads=threads
            )
        )
        output: Tensor = _Empty.apply(self._recorder, len(self.calls) - 1, query, key, value)
        return output


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorder: MemoryRecorder, call: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, queries, _ = query.shape
        output = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)  # (B, H, N, Dv), as it lies
        marker = query.new_empty(1)
        recorder.keep_for_backward(marker, call)
        recorder.work(call)
        ctx.recorder, ctx.call = recorder, call
        ctx.save_for_backward(query, key, value, marker)
        return output

    @staticmethod
    def backward(ctx: Any, *_grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, _marker = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in inputs]
        ctx.recorder.work(ctx.call)
        return None, None, *gradients
