"""A stand-in for PyTorch's attention that computes nothing and tells what was asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from slicemod.fused import fused_obstacle
from slicemod.math_kernel import attention_shape, attention_sizes
from slicemod.planning.memory_timeline import MemoryRecorder
from slicemod.shapes import AttentionShape


@dataclass(frozen=True)
class AttentionCall:
    """One attention call: its sizes, and why PyTorch would not fuse it, or None if it would."""

    shape: AttentionShape
    fused_obstacle: str | None


class AttentionStandIn(TorchFunctionMode):
    """While entered, `F.scaled_dot_product_attention` gives an empty output, and its gradients are empty too.

    Args:
        recorder: told when a call works and what it keeps for its backward pass.
        device_type: that the step is planned for, which decides about fused kernels and the dtype of scores.

    Attributes:
        calls: in the order in which they came; a call that is computed again for the backward pass comes twice.
    """

    def __init__(self, recorder: MemoryRecorder, device_type: str) -> None:
        super().__init__()
        self._recorder, self._device_type = recorder, device_type
        self.calls: list[AttentionCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls.append(self._note(*args, **(kwargs or {})))
        return _Empty.apply(self._recorder, len(self.calls) - 1, *args[:3])

    def _note(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> AttentionCall:
        upcast = self._device_type == "cpu" and query.element_size() < 4  # as `sliced_attention` does it
        sizes = attention_sizes(
            query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, upcast=upcast
        )
        if self._device_type in ("cpu", "cuda"):  # that the GPU fuses what the CPU does is an assumption
            obstacle = fused_obstacle(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        else:
            obstacle = f"it is not known whether PyTorch runs a fused kernel on {self._device_type!r}"
        return AttentionCall(attention_shape(sizes), obstacle)


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
        *inputs, marker = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in inputs]
        ctx.recorder.work(ctx.call)
        del marker  # lives until here
        return None, None, *gradients
