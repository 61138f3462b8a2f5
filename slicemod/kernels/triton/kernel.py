"""The Triton kernel: what it can run, and the few bytes that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from slicemod.call import CallSpec
from slicemod.kernels.attention_operators import AttentionCall
from slicemod.kernels.crossover_table import CrossoverTable
from slicemod.kernels.kernel import Arguments, Inputs, Kernel, Terms, row_bytes
from slicemod.kernels.triton.operators import triton_attention
from slicemod.kernels.triton.present import triton_obstacle
from slicemod.plan import SlicePlan

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SEED_BYTES = 8


class TritonKernel(Kernel):
    """Exact attention with a running softmax, for what PyTorch's fused kernels do not compute or have no memory for.

    Args:
        device_obstacle: says why a device cannot run it, or None if it can.
    """

    name: ClassVar[str] = "triton"
    summary: ClassVar[str] = "Triton for NVIDIA GPUs from Ampere on and AMD's CDNA: any head size, mask and dropout"

    def __init__(self, device_obstacle: Callable[[torch.device], str | None] = triton_obstacle) -> None:
        self._device_obstacle = device_obstacle

    def obstacle(self, call: CallSpec) -> str | None:
        """Why it cannot run this call."""
        if (obstacle := self._device_obstacle(call.device)) is not None:
            return obstacle
        shape = call.shape
        if call.dtype not in _DTYPES:
            return f"it does not compute {call.dtype}"
        if call.transformed:
            return "torch.func differentiates PyTorch's operators alone"
        if not call.ordinary_scale:
            return "it does not compute a scale that is not positive, or that float32 cannot hold"
        if not (shape.head_dim and shape.values):
            return "it does not compute heads without channels"
        if shape.keys == 1 and call.training:
            return "the gradient of the query is exactly zero where there is one key, and it gives noise"
        return None

    def pays_off(self, call: CallSpec, table: CrossoverTable) -> bool:
        """On a GPU. Nothing is measured there that says otherwise; interpreted on a CPU, it takes thousands of times as
        long as any other."""
        return call.device.type != "cpu"

    def plan(self, call: CallSpec, free_bytes: int, terms: Terms) -> SlicePlan | None:
        """One step. In training, two float32 numbers for each row: its log-sum-exp, and in the backward pass the
        product of the output with its gradient. With dropout, a seed."""
        shape = call.shape
        peak = (2 * row_bytes(shape) if call.training else 0) + (_SEED_BYTES if shape.dropout else 0)
        if peak > free_bytes:
            return None
        return SlicePlan("query", 1, shape.queries, peak, self.name, terms.policy, shape.batch_heads, shape.queries)

    def attend(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Tensor:
        """One operator, forward and backward."""
        output: Tensor
        output, _ = triton_attention(*AttentionCall.of(inputs, more), more.training)
        return output
