"""`explain`: what every kernel says to a call, as `sliced_attention` would ask them; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slicemod.call import needs_grad, upcasts
from slicemod.card import card_of
from slicemod.choose import Answer, answers
from slicemod.config import SliceConfig
from slicemod.dispatch import call_spec, describe
from slicemod.kernels.fused.obstacles import layout_of
from slicemod.kernels.kernel import Arguments
from slicemod.layers.inputs import as_four_dims, autocast_inputs, check_inputs


def explain(  # noqa: PLR0913 - the signature of F.scaled_dot_product_attention
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
    device: torch.device | str | None = None,
) -> list[Answer]:
    """What every kernel says to a call of `sliced_attention`: which one takes it, and why the others do not.

    Nothing is computed, so that tensors on the device "meta", which have sizes and no memory, will do.

    Args:
        query: as `sliced_attention` takes it, and so are key, value and all others that are not named here.
        slicing: a `SliceConfig`, or a dict of its fields; of a budget, what is free now.
        device: where the call would run, if not where the tensors are. It need not be there, if the budget is in bytes;
            that PyTorch has a fused kernel is then taken for granted on CUDA.

    Returns:
        An `Answer` for each of `slicemod.kernels.KERNELS`, best first: its plan, and why it is passed over, or None for
        the one that is taken. Where none is, the call would raise. Empty where there is nothing to attend to.

    Raises:
        ValueError: sizes, dtypes, devices or settings that do not go together; or tensors on "meta" without `device`.
        RuntimeError: the budget is a share of what the device has free, and that cannot be read.

    >>> query, key, value = torch.randn(3, 2, 5, 61, 11, device="meta", dtype=torch.float64).unbind()
    >>> for answer in explain(query, key, value, dropout_p=0.1, slicing={"budget": "1MiB"}, device="cpu")[2:]:
    ...     print(answer)
    fused: the CPU's fused kernel has no dropout
    triton: it runs on GPUs, and the call is on cpu (TRITON_INTERPRET=1 runs it there, for tests)
    math, 810,520 bytes (exact): taken
    """
    where = query.device if device is None else torch.device(device)
    if where.type == "meta":
        raise ValueError(
            "device: expected the one that the call would run on, since its tensors have no memory; got meta. Pass for "
            'example device="cuda".'
        )
    query, key, value, attn_mask = autocast_inputs(query, key, value, attn_mask)
    check_inputs(query, key, value, attn_mask, dropout_p, is_causal)
    arguments = Arguments(dropout_p, is_causal, scale, enable_gqa)
    layout = layout_of((query, key, value, attn_mask), arguments)
    inputs = as_four_dims(query, key, value, attn_mask, enable_gqa)
    call = call_spec(*describe(inputs, arguments._replace(training=needs_grad(*inputs)), layout))
    shape = call.shape
    if 0 in (shape.batch, shape.heads, shape.queries, shape.keys):
        return []
    if where != call.device:
        shape = replace(shape, upcast=upcasts(where.type, shape.itemsize))
        call = replace(call, shape=shape, device=where, card=card_of(where))
    config = SliceConfig.of(slicing)
    return answers(call, config, config.parsed_budget.bytes_on(where))
