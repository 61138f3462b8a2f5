"""PyTorch's flash attention in float32, for half precision on CPUs that have no instructions to multiply it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from slicemod.call import AttentionShape, CallSpec, scale_of
from slicemod.half_precision import cpu_products
from slicemod.kernels.crossover_table import CrossoverTable
from slicemod.kernels.fused.cpu_bytes import cpu_flash_peak
from slicemod.kernels.fused.float32_operators import float32_flash
from slicemod.kernels.fused.obstacles import fused_obstacle
from slicemod.kernels.kernel import Arguments, Inputs, Kernel, Terms
from slicemod.plan import SlicePlan
from slicemod.rounding import ceil_div

# Bytes of query, key, value and output in float32 that one turn may take. More heads at a time were no faster.
_TURN_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Float32FlashBytes:
    """Bytes of `float32_flash` in turns of `heads` heads, on `threads` threads."""

    shape: AttentionShape
    heads: int
    threads: int

    def peak(self, *, training: bool) -> int:
        """Peak bytes beyond inputs, output and input gradients."""
        shape = self.shape
        turn = replace(shape, batch=1, heads=self.heads, key_heads=None, itemsize=4, upcast=False, mask=None)
        rows, keys = self.heads * shape.queries * shape.head_dim, self.heads * shape.keys * shape.head_dim
        mask = 0
        if shape.mask is not None:
            part = replace(shape.mask, batch=1, heads=min(shape.mask.heads, self.heads))
            mask = 4 * part.elements
        forward = 4 * (2 * rows + 2 * keys) + cpu_flash_peak(turn, self.threads, training=False) + mask
        if not training:
            return forward
        kept = 4 * shape.batch_heads * shape.queries
        backward = 4 * (4 * rows + 4 * keys) + cpu_flash_peak(turn, self.threads, training=True) + mask
        return kept + max(forward, backward)


class Float32FlashKernel(Kernel):
    """It converts some heads at a time to float32, so that no input exists twice as a whole."""

    name: ClassVar[str] = "fused-float32"
    summary: ClassVar[str] = "PyTorch's flash attention in float32, for CPUs that multiply no half precision"

    def obstacle(self, call: CallSpec) -> str | None:
        """Why it cannot run this call."""
        if call.device.type != "cpu" or call.dtype.itemsize != 2:
            return f"it is for half precision on CPUs, and the call is {call.dtype} on {call.device.type}"
        if call.transformed:
            return "torch.func differentiates PyTorch's operators alone"
        if call.shape.group != 1:
            return "it wants the same heads for query, key and value"
        return fused_obstacle(call)

    def pays_off(self, call: CallSpec, table: CrossoverTable) -> bool:
        """By the table; if that does not say, for float16, and for training in bfloat16, on a CPU that cannot multiply
        them.

        Measured with AVX2: PyTorch's own kernel takes twice as long or longer for float16, and five times as long for a
        backward pass. For bfloat16 in inference it converts while it computes, in less memory; this kernel then takes
        0.85 to 1.7 times as long.
        """
        measured = table.is_faster(self.name, call)
        if measured is not None:
            return measured
        return cpu_products(call.dtype) is None and (call.dtype == torch.float16 or call.training)

    def plan(self, call: CallSpec, free_bytes: int, terms: Terms) -> SlicePlan | None:
        """As many heads at a time as are fast, or fewer if they do not fit.

        The backward pass of PyTorch's kernel shares out heads among the threads, and nothing else. So a turn has a
        multiple of the number of threads if possible.
        """
        shape, threads = call.shape, call.threads
        per_head = 8 * (shape.queries + shape.keys) * max(1, shape.head_dim)
        heads = min(shape.heads, max(1, _TURN_BYTES // per_head // threads) * threads)
        while (peak := Float32FlashBytes(shape, heads, threads).peak(training=call.training)) > free_bytes:
            if heads == 1:
                return None
            heads //= 2
        return SlicePlan(
            axis="heads",
            steps=shape.batch * ceil_div(shape.heads, heads),
            slice_size=heads,
            peak_bytes=peak,
            kernel=self.name,
            policy=terms.policy,
            heads=heads,
            rows=shape.queries,
            upcast=True,
        )

    def holds(self, plan: SlicePlan, call: CallSpec) -> bool:
        """Whether turns of as many heads fit."""
        turns = Float32FlashBytes(call.shape, min(plan.heads, call.shape.heads), call.threads)
        return turns.peak(training=call.training) <= plan.peak_bytes

    def attend(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Tensor:
        """One operator, forward and backward."""
        query, key, value, mask = inputs
        scale = scale_of(query, more.scale)
        output: Tensor
        output, _ = float32_flash(query, key, value, mask, more.is_causal, scale, plan.heads, more.training)
        return output
