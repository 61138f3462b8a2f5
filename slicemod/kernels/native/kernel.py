"""The native kernel: what it can run, and how many bytes it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from slicemod.call import CallSpec
from slicemod.kernels.attention_operators import AttentionCall
from slicemod.kernels.crossover_table import CrossoverTable
from slicemod.kernels.kernel import Arguments, Inputs, Kernel, Run, Terms, row_bytes
from slicemod.kernels.native.binding import NativeLibrary
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.kernels.native.operators import native_attention
from slicemod.kernels.native.prepared import prepared_inference, prepared_training
from slicemod.plan import SlicePlan
from slicemod.rounding import ceil_div

_SEED_BYTES = 8


class NativeKernel(Kernel):
    """Attention in C++ for x86-64 and Arm CPUs, compiled at its first use.

    Args:
        library: returns the compiled library, or None if there is none.
    """

    name: ClassVar[str] = "native"
    summary: ClassVar[str] = "C++ for CPUs with AVX2, AVX-512, AMX or NEON, compiled at its first use"

    def __init__(self, library: Callable[[], NativeLibrary | None] = native_library) -> None:
        self._library = library

    def obstacle(self, call: CallSpec) -> str | None:
        """Why it cannot run this call."""
        shape = call.shape
        if call.device.type != "cpu":
            return f"it runs on CPUs, and the call is on {call.device.type}"
        library = self._library()
        if library is None:
            return native_obstacle() or "its library is not there"
        if call.dtype not in library.modes:
            return f"it does not compute {call.dtype}"
        if call.transformed:
            return "torch.func differentiates PyTorch's operators alone"
        there_is = {
            "a scale that is not positive, or that float32 cannot hold": not call.ordinary_scale,
            "heads without channels": not (shape.head_dim and shape.values),
        }
        if found := [what for what, is_there in there_is.items() if is_there]:
            return f"it does not compute {', '.join(found)}"
        if shape.keys == 1 and call.training:
            return "the gradient of the query is exactly zero where there is one key, and it gives noise"
        return None

    def pays_off(self, call: CallSpec, table: CrossoverTable) -> bool:
        """By measurement alone."""
        return bool(table.is_faster(self.name, call))

    def plan(self, call: CallSpec, free_bytes: int, terms: Terms) -> SlicePlan | None:
        """Blocks of as many rows as the library computes at a time. The library itself counts its bytes."""
        library, shape = self._library(), call.shape
        if library is None:
            return None
        rows, forward, backward = library.sizes(call.dtype, shape, call.threads)
        peak = forward
        if call.training:
            row = row_bytes(shape)
            peak = 2 * row + max(forward, backward + row)  # the backward pass computes one more number for each row
        if shape.dropout:
            peak += _SEED_BYTES
        if peak > free_bytes:
            return None
        return SlicePlan(
            axis="query",
            steps=ceil_div(shape.queries, rows),
            slice_size=rows,
            peak_bytes=peak,
            kernel=self.name,
            policy=terms.policy,
            heads=1,
            rows=rows,
        )

    def attend(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Tensor:
        """One operator, forward and backward."""
        output: Tensor
        output, _ = native_attention(*AttentionCall.of(inputs, more), more.training)
        return output

    def prepare(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Run:
        """Everything but the addresses of the tensors is prepared."""
        call = AttentionCall.of(inputs, more)
        if not more.training:
            return prepared_inference(call)
        if call.mask is not None and call.mask.requires_grad:
            return super().prepare(plan, inputs, more)
        return prepared_training(call)

    def kept_bytes(self, call: CallSpec, plan: SlicePlan) -> int:
        """Two float32 numbers for each row: a product near its largest, and the logarithm of its sum of weights."""
        return 2 * row_bytes(call.shape) if call.training else 0
