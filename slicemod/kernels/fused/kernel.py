"""PyTorch's own fused attention: flash, memory-efficient, cuDNN or Metal's, as PyTorch chooses."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.attention import SDPBackend

from slicemod.call import CallSpec
from slicemod.half_precision import cpu_products
from slicemod.kernels.fused.cpu_bytes import cpu_flash_peak
from slicemod.kernels.fused.cpu_flash import differentiable_flash_attention, flash_attention
from slicemod.kernels.fused.cuda_bytes import CUDNN, EFFICIENT, FLASH, cuda_fused_peak
from slicemod.kernels.fused.cuda_conditions import kernels_of_card
from slicemod.kernels.fused.metal_attention import metal_attention, metal_peak
from slicemod.kernels.fused.obstacles import fused_obstacle
from slicemod.kernels.fused.running import fused_attention, is_fused, sdpa
from slicemod.kernels.kernel import Arguments, Inputs, Kernel, Run, Terms
from slicemod.kernels.second_order import with_second_derivatives
from slicemod.plan import SlicePlan
from slicemod.watched import is_watched

_CUDA_KERNEL_OF = {
    SDPBackend.FLASH_ATTENTION.value: FLASH,
    SDPBackend.EFFICIENT_ATTENTION.value: EFFICIENT,
    SDPBackend.CUDNN_ATTENTION.value: CUDNN,
}


class FusedKernel(Kernel):
    """`F.scaled_dot_product_attention`, if it is certain that one of its fused kernels runs."""

    name: ClassVar[str] = "fused"
    summary: ClassVar[str] = "PyTorch's own: flash, memory-efficient or cuDNN attention"

    def obstacle(self, call: CallSpec) -> str | None:
        """Why it cannot run this call."""
        return fused_obstacle(call)

    def plan(self, call: CallSpec, free_bytes: int, terms: Terms) -> SlicePlan | None:
        """One step, because this kernel is never sliced."""
        peak, shape = fused_peak(call), call.shape
        if peak > free_bytes:
            return None
        return SlicePlan("query", 1, shape.queries, peak, self.name, terms.policy, shape.batch_heads, shape.queries)

    def attend(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Tensor:
        """PyTorch's function, in a way that lets PyTorch run nothing but a fused kernel."""
        if inputs[0].device.type == "mps":
            return metal_attention(inputs, more)
        if is_watched(*inputs[:3]):
            return fused_attention(inputs, more)
        if _is_plain_on_cpu(inputs, more):
            return _plain_on_cpu(more)(*inputs)
        output = fused_attention(inputs, more)
        return with_second_derivatives(output, inputs, more) if more.training else output

    def prepare(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Run:
        """It does not ask PyTorch for its choice again if the answer is known.

        Autograd keeps the same tensors as after `attend`, because a checkpoint compares its second run with the first.
        """
        if _is_plain_on_cpu(inputs, more):
            return _plain_on_cpu(more)
        if is_fused(more.choice, inputs, more) and not more.training:
            return lambda *inputs: sdpa(inputs, more)
        if is_fused(more.choice, inputs, more):
            return lambda *inputs: with_second_derivatives(sdpa(inputs, more), inputs, more)
        return super().prepare(plan, inputs, more)


def _is_plain_on_cpu(inputs: Inputs, more: Arguments) -> bool:
    """PyTorch's flash attention for CPUs can be called by itself."""
    query, _, _, mask = inputs
    return query.is_cpu and mask is None and not more.enable_gqa


def _plain_on_cpu(more: Arguments) -> Run:
    flash = differentiable_flash_attention if more.training else flash_attention
    return lambda query, key, value, _mask: flash(query, key, value, more.is_causal, more.scale)


def fused_peak(call: CallSpec) -> int:
    """Peak bytes of PyTorch's fused attention beyond inputs, output and input gradients.

    On CUDA it is what PyTorch's choice takes. If PyTorch was not asked for it, as while a graph is traced, it is the
    most that any kernel takes that can run the call.
    """
    if call.device.type == "cpu":
        products = cpu_products(call.dtype)
        return cpu_flash_peak(call.shape, call.threads, training=call.training, products=products)
    if call.device.type == "mps":
        return metal_peak(call.shape)
    runs = kernels_of_card(call) if call.layout.runs is None else call.layout.runs
    choice = _CUDA_KERNEL_OF.get(-1 if call.layout.choice is None else call.layout.choice)
    return cuda_fused_peak(call, (choice,) if choice in runs else runs)
