"""From the tensors of a call to a `CallSpec` in plain values, and from a plan to its kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slicemod import kernels
from slicemod.call import (
    CallSpec,
    Layout,
    attention_shape,
    attention_sizes,
    constant_bool,
    has_ordinary_scale,
    must_be_deterministic,
    upcasts,
)
from slicemod.card import card_of
from slicemod.kernels.kernel import Arguments, Inputs
from slicemod.plan import SlicePlan
from slicemod.watched import PlainValues, constant_in_graph, is_transformed, plain_values

_PLAN_FIELDS = SlicePlan.__match_args__


def describe(inputs: Inputs, arguments: Arguments, layout: PlainValues) -> PlainValues:
    """The arguments of `call_spec` for 4-D inputs: plain values, which become constants if a graph is traced.

    Args:
        inputs: query `(B, H, N, D)`, key `(B, Hk, M, D)`, value `(B, Hk, M, Dv)` and mask.
        arguments: the other arguments of the call.
        layout: the result of `layout_of` for the caller's tensors.
    """
    query, scale = inputs[0], arguments.scale
    upcast = upcasts(query.device.type, query.element_size())
    causal = constant_bool(arguments.is_causal)
    sizes = attention_sizes(*inputs, dropout_p=arguments.dropout_p, is_causal=causal, upcast=upcast)
    ordinary_scale = constant_bool(has_ordinary_scale(scale))
    return sizes, layout, str(query.device), query.dtype, arguments.training, ordinary_scale


def call_spec(
    sizes: PlainValues,
    layout: PlainValues,
    device: str,
    dtype: torch.dtype,
    training: bool,
    ordinary_scale: bool,
) -> CallSpec:
    """The `CallSpec` of a call that `describe` described. Not for code that is traced."""
    return CallSpec(
        attention_shape(sizes),
        dtype,
        torch.device(device),
        training,
        ordinary_scale,
        Layout(*layout),
        is_transformed(),
        torch.get_num_threads(),
        card_of(torch.device(device)),
        must_be_deterministic(),
    )


def check_plan(plan: SlicePlan, described: PlainValues) -> None:
    """Checks that the call that `describe` described can follow a plan that the user passed, within the plan's bytes.

    Raises:
        ValueError: it cannot.
    """
    misfit = _misfit(plain_values(plan, _PLAN_FIELDS), *described)
    if misfit is not None:
        raise ValueError(
            f"plan: expected one made for this call; got one of {misfit}. Leave plan out, or make one for this call."
        )


@constant_in_graph
def _misfit(fields: PlainValues, *described: Any) -> str | None:
    plan, call = SlicePlan(*fields), call_spec(*described)
    kernel = kernels.kernel_named(plan.kernel)
    if (obstacle := kernel.obstacle(call)) is not None:
        return f'kernel="{plan.kernel}", and {obstacle}'
    if kernel.holds(plan, call):
        return None
    return f"{plan.peak_bytes:,} bytes, and {call.shape}{', with gradients,' if call.training else ''} take more by it"


def follow(plan: SlicePlan, inputs: Inputs, arguments: Arguments) -> Tensor:
    """Runs the plan's kernel on 4-D inputs, and returns the output `(B, H, N, Dv)`."""
    return kernels.kernel_named(plan.kernel).attend(plan, inputs, arguments)
