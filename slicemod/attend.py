"""How a layer of ours attends by its settings: as a whole, in parts, or once more in the backward pass.

The layer, here the owner, is a module or a processor. It has its settings in the attribute `slicing`, and its attribute
`plan` becomes the plan of the call. The latter does not change while the layer is traced for compilation: the plan is a
constant of the graph then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slicemod.functional import planned_attention
from slicemod.layers.streaming import Projections, StreamPlan, plan_stream, stream


def attend(owner: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`sliced_attention` for a layer."""
    output, plan = planned_attention(query, key, value, mask, scale=scale, slicing=owner.slicing)
    if not torch.compiler.is_compiling() and owner.plan is not plan:  # to set a module's attribute takes microseconds
        owner.plan = plan
    return output


def plan_parts(owner: Any, x: Tensor, context: Tensor, heads: int) -> StreamPlan | None:
    """The parts in which a layer of `x` `(B, N, C)` and `context` `(B, M, C')` is computed in inference.

    None if it has to be computed as a whole: if it is small, if the user decides how the attention is sliced, or if a
    graph is traced, whose number of tokens may be symbolic.
    """
    if torch.compiler.is_compiling():
        return None
    if owner.slicing.kernel == "math" or owner.slicing.steps is not None:
        return None
    return plan_stream(heads, x.shape[1], context.shape[1], x.device.type)


def attend_in_parts(
    owner: Any, plan: StreamPlan, parts: Projections, x: Tensor, context: Tensor, scale: float
) -> Tensor:
    """A layer with its projections, in parts. The owner gets the attention's plan of its last part."""

    def attend_part(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(owner, query, key, value, None, scale)

    return stream(plan, parts, x, context, attend_part)


def recomputed(layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`layer(*inputs)`, which keeps only its inputs for the backward pass, and computes all else once more there."""
    output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
    return output
