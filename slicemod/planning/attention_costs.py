"""The memory of one attention call within a step, for each way to compute it."""

from __future__ import annotations

from slicemod.call import CallSpec
from slicemod.half_precision import cpu_products
from slicemod.kernels import kernel_named
from slicemod.kernels.fused.kernel import fused_peak
from slicemod.kernels.kernel import row_bytes
from slicemod.plan import SlicePlan
from slicemod.planning.memory_timeline import AttentionCost


def full_attention_cost(call: CallSpec, *, upcast: bool) -> AttentionCost:
    """Full attention as diffusers' AttnProcessor computes it, which holds two tensors of all scores at a time.

    In training the weights are kept, and the two tensors are gradients. With `upcast`, which is diffusers'
    `upcast_attention`, scores are float32. Weights in the dtype of the inputs are then kept too, and freed before the
    second gradient is made. A CPU whose products are "widened" (`cpu_products`) also holds the scores of one head in
    float32.
    """
    shape = call.shape
    pairs = shape.batch_heads * shape.queries * shape.keys
    upcast = upcast and shape.itemsize < 4
    scores = pairs * (4 if upcast else shape.itemsize)
    copied = pairs * shape.itemsize if upcast else 0
    if call.training:
        return AttentionCost(scores + copied, 2 * scores - copied)
    widened = call.device.type == "cpu" and cpu_products(call.dtype) == "widened" and not upcast
    return AttentionCost(0, 2 * scores + (4 * shape.queries * shape.keys if widened else 0))


def fused_attention_cost(call: CallSpec) -> AttentionCost:
    """Attention by PyTorch's fused kernel, whether or not it is certain to run."""
    kept = row_bytes(call.shape) if call.training else 0
    return AttentionCost(kept, fused_peak(call) - kept)


def planned_attention_cost(call: CallSpec, plan: SlicePlan) -> AttentionCost:
    """Attention by one of slicemod's plans."""
    kept = kernel_named(plan.kernel).kept_bytes(call, plan)
    return AttentionCost(kept, plan.peak_bytes - kept)
