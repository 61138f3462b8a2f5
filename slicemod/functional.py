"""`sliced_attention`: attention within a memory budget, with the signature of PyTorch's own function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slicemod import kernels
from slicemod.call import needs_grad
from slicemod.choose import CallPlans, plans_of
from slicemod.config import SETTINGS, SliceConfig
from slicemod.dispatch import call_spec, check_plan, describe, follow
from slicemod.graph_operators import is_dynamic, planned_at_run_time, refused
from slicemod.kernels.fused.obstacles import layout_of
from slicemod.kernels.kernel import Arguments, Inputs
from slicemod.known_calls import KNOWN_CALLS, CallKey, KnownCall, key_of
from slicemod.layers.inputs import as_four_dims, autocast_inputs, check_inputs
from slicemod.plan import NotEnoughMemoryError, SlicePlan
from slicemod.watched import PlainValues, constant_in_graph, plain_values


def sliced_attention(  # noqa: PLR0913 - the signature of F.scaled_dot_product_attention
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    slicing: SliceConfig | Mapping[str, Any] | None = None,
    plan: SlicePlan | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention` within a memory budget.

    It computes `softmax(scale * query key^T + attn_mask) value`. Where a bool mask is False, `attn_mask` is -inf. The
    result is that of full attention, whatever the number of slices.

    Args:
        query: `(..., H, N, D)`, float32, bfloat16, float16 or float64. `(N, D)` and `(H, N, D)` are accepted too.
        key: `(..., H, M, D)`, with the dtype and device of `query`.
        value: `(..., H, M, Dv)`, with the dtype and device of `query`.
        attn_mask: broadcastable to `(..., H, N, M)`. A bool mask is True where a query may look. A floating-point mask
            is added to the scores, and may need a gradient. A row that may look at no key gives zeros.
        dropout_p: probability of dropping an attention weight. Applied whenever it is above 0, as in SDPA.
        is_causal: query `i` sees keys `0..i`. Not together with `attn_mask`.
        scale: factor of the scores; `1 / sqrt(D)` when left out.
        enable_gqa: key and value may have fewer heads than query. Their number has to divide `H`.
        slicing: a `SliceConfig`, or a dict of its fields.
        plan: follow this plan instead of making one. Not together with `slicing`. It may be the plan of another call,
            such as a larger one, if this call takes no more than its `peak_bytes` by it. Whether gradients are needed,
            the mask, `is_causal` and dropout count too.

    Under autocast, query, key, value and a floating-point mask are cast to the autocast dtype, as by SDPA. The sliced
    kernel computes half precision in float32 tiles on CPU and CUDA, and on other devices with `SliceConfig.upcast`.

    Returns:
        `(..., H, N, Dv)` in the dtype of `query`. A 4-D output is laid out as `(B, N, H, Dv)` in memory, so that a
        layer merges its heads without a copy.

    Raises:
        NotEnoughMemoryError: no plan fits the budget.
        ValueError: sizes, dtypes, devices or settings do not go together, the kernel that `slicing` names cannot run
            the call, or by `plan` it would take more bytes than the plan says.
        NotImplementedError: an input carries a tangent of forward-mode differentiation.

    >>> query, key, value = torch.randn(3, 2, 5, 7, 4).unbind()
    >>> sliced_attention(query, key, value, slicing={"kernel": "math", "steps": 3}).shape
    torch.Size([2, 5, 7, 4])
    """
    return planned_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, slicing=slicing, plan=plan
    )[0]


def planned_attention(  # noqa: PLR0913 - the signature of F.scaled_dot_product_attention
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    slicing: SliceConfig | Mapping[str, Any] | None = None,
    plan: SlicePlan | None = None,
) -> tuple[Tensor, SlicePlan | None]:
    """`sliced_attention`, which also returns the plan that it followed.

    Returns:
        The output, and the plan. The plan is None if there was nothing to compute (a size is 0), and in a graph that
        plans when it runs, such as one with a dynamic number of tokens by `torch.export`.
    """
    if plan is not None and (slicing is not None or not isinstance(plan, SlicePlan)):
        raise ValueError(
            f"plan: expected a SlicePlan and no slicing beside it; got {type(plan).__name__}"
            f"{' and slicing' if slicing is not None else ''}. Pass the one or the other."
        )
    query, key, value, attn_mask = autocast_inputs(query, key, value, attn_mask)
    if isinstance(scale, Tensor):  # as PyTorch's own takes it; what is remembered by a tensor may change in it
        scale = scale.item()  # type: ignore[unreachable]
    arguments = Arguments(dropout_p, is_causal, scale, enable_gqa)
    known_as = None
    if plan is None and dropout_p == 0:
        known_as = key_of((query, key, value, attn_mask), arguments, slicing)
        if (known := KNOWN_CALLS.find(known_as)) is not None:
            plan = known.plans.now()
            if known.run is not None and plan is known.plans.best:
                return known.run(query, key, value, attn_mask), plan
            return follow(plan, (query, key, value, attn_mask), known.arguments), plan
    shapes = query.shape, key.shape, value.shape
    check_inputs(query, key, value, attn_mask, dropout_p, is_causal)
    # Of the caller's tensors, before they are seen as 4-D: PyTorch decides by these whether it fuses.
    layout = layout_of((query, key, value, attn_mask), arguments)
    lead = query.shape[:-2]
    inputs = as_four_dims(query, key, value, attn_mask, enable_gqa)
    query, key, value, _ = inputs
    batch, heads, queries, head_dim = query.shape
    if 0 in (batch, heads, queries, key.shape[2]):
        output = (query @ key.new_zeros(1, 1, head_dim, 1)) * value.new_zeros(value.shape[3])  # (B, H, N, Dv)
        return output.reshape(*lead, queries, value.shape[3]), None
    arguments = arguments._replace(training=needs_grad(*inputs))
    if is_dynamic(inputs):
        if plan is not None:
            raise ValueError(
                "plan: expected none in a graph with a dynamic number of tokens, as a plan is made for fixed sizes; "
                f"got {plan}. Leave plan out: such a graph plans when it runs."
            )
        output = planned_at_run_time(inputs, arguments, SliceConfig.of(slicing))
        return output.reshape(*lead, queries, value.shape[3]), None
    described = describe(inputs, arguments, layout)
    if plan is not None:
        check_plan(plan, described)
    elif torch.compiler.is_dynamo_compiling():
        settings = plain_values(slicing, SETTINGS) if isinstance(slicing, SliceConfig) else slicing
        found = _plan_in_graph(settings, *described)
        if isinstance(found, str):
            output = refused(query, value, found)
            return output.reshape(*lead, queries, value.shape[3]), None
        plan = found
    else:
        plans = plans_of(call_spec(*described), SliceConfig.of(slicing))
        plan = plans.now()
        if known_as is not None and shapes == (query.shape, key.shape, value.shape):  # not viewed as 4-D
            _remember(known_as, plans, inputs, arguments._replace(choice=layout[-1]))
    output = follow(plan, inputs, arguments)
    return output if len(lead) == 2 else output.reshape(*lead, queries, value.shape[3]), plan


@constant_in_graph
def _plan_in_graph(settings: PlainValues | Mapping[str, Any] | None, *described: Any) -> SlicePlan | str:
    """The plan of a call, or the text that says why there is none.

    It runs outside of the traced graph, and its answer is a constant of the graph.
    """
    slicing = SliceConfig(*settings) if isinstance(settings, tuple) else SliceConfig.of(settings)
    try:
        return plans_of(call_spec(*described), slicing).now()
    except NotEnoughMemoryError as error:  # the graph raises it when it runs, as the same type
        return str(error)


def _remember(key: CallKey, plans: CallPlans, inputs: Inputs, arguments: Arguments) -> None:
    best = plans.best
    run = None if best is None else kernels.kernel_named(best.kernel).prepare(best, inputs, arguments)
    KNOWN_CALLS.remember(key, KnownCall(plans, arguments, run))
