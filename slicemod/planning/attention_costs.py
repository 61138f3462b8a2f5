"""What one attention call takes of a step's memory, for each way to compute it."""

from __future__ import annotations

from slicemod.call import CallSpec
from slicemod.half_precision import cpu_products
from slicemod.kernels import kernel_named
from slicemod.kernels.fused.kernel import fused_peak
from slicemod.plan import SlicePlan
from slicemod.planning.memory_timeline import AttentionCost


def full_attention_cost(call: CallSpec, *, upcast: bool) -> AttentionCost:
    """Scores of every pair, as diffusers' AttnProcessor has them: two such tensors at a time.

    In training the weights are kept, and the two are gradients. With `upcast`, diffusers' `upcast_attention`, scores
    are float32; weights in the inputs' dtype are kept besides, and freed before the second gradient is made. A CPU
    whose products are "widened" has those of a head in float32 besides.
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
    """PyTorch's fused kernel, whether or not it is certain to run."""
    kept = kernel_named("fused").kept_bytes(call.shape, training=call.training)
    return AttentionCost(kept, fused_peak(call) - kept)


def planned_attention_cost(call: CallSpec, plan: SlicePlan) -> AttentionCost:
    """slicemod's attention by a plan."""
    kept = kernel_named(plan.kernel).kept_bytes(call.shape, training=call.training)
    return AttentionCost(kept, plan.peak_bytes - kept)
