"""What one attention call takes of a step's memory, for each way to compute it."""

from __future__ import annotations

from slicemod.onednn_scratch import Products
from slicemod.plan import SlicePlan, fused_peak
from slicemod.planning.memory_timeline import AttentionCost
from slicemod.shapes import AttentionShape

_LOGSUMEXP_BYTES = 4  # a row's log-sum-exp, in float32


def full_attention_cost(
    shape: AttentionShape, *, training: bool, upcast: bool, products: Products | None = None
) -> AttentionCost:
    """Scores of every pair, as diffusers' AttnProcessor has them: two such tensors at a time.

    In training the weights are kept, and the two are gradients. With `upcast`, diffusers' `upcast_attention`, scores
    are float32; weights in the inputs' dtype are kept besides, and freed before the second gradient is made. A CPU
    whose `products` are "widened" has those of a head in float32 besides.
    """
    pairs = shape.batch_heads * shape.queries * shape.keys
    upcast = upcast and shape.itemsize < 4
    scores = pairs * (4 if upcast else shape.itemsize)
    copied = pairs * shape.itemsize if upcast else 0
    if training:
        return AttentionCost(scores + copied, 2 * scores - copied)
    of_a_head = 4 * shape.queries * shape.keys if products == "widened" and not upcast else 0
    return AttentionCost(0, 2 * scores + of_a_head)


def fused_attention_cost(
    shape: AttentionShape, device_type: str, *, training: bool, products: Products | None = None
) -> AttentionCost:
    """PyTorch's fused kernel; the log-sum-exp of every row is kept for its backward pass.

    `products`: how a CPU multiplies this half precision.
    """
    kept = kept_by_fused(shape, training=training)
    return AttentionCost(kept, fused_peak(shape, device_type, training=training, products=products) - kept)


def planned_attention_cost(shape: AttentionShape, plan: SlicePlan, *, training: bool) -> AttentionCost:
    """slicemod's attention; its sliced kernel keeps nothing but its inputs, which the step has anyway.

    The native one keeps a number for each row, as the fused one does.
    """
    kept = 0 if plan.kernel == "math" else kept_by_fused(shape, training=training)
    return AttentionCost(kept, plan.peak_bytes - kept)


def kept_by_fused(shape: AttentionShape, *, training: bool) -> int:
    """Bytes that a fused kernel keeps from forward to backward, beyond inputs and output."""
    return shape.batch_heads * shape.queries * _LOGSUMEXP_BYTES if training else 0
