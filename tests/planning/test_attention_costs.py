"""What attention is counted with is what it takes: measured on a call by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor

from slicemod import AttentionShape, plan_slices, sliced_attention
from slicemod.bench.memory import peak_memory
from slicemod.call import CallSpec
from slicemod.planning.attention_costs import full_attention_cost, fused_attention_cost, planned_attention_cost
from slicemod.planning.memory_timeline import AttentionCost

BATCH, HEADS, TOKENS, HEAD_DIM = 1, 3, 1021, 29
DTYPES = (torch.float32, torch.bfloat16)


def _shape(dtype: torch.dtype) -> AttentionShape:
    return AttentionShape(BATCH, HEADS, TOKENS, TOKENS, HEAD_DIM, dtype.itemsize, upcast=dtype.itemsize < 4)


def _call(dtype: torch.dtype, *, training: bool) -> CallSpec:
    return CallSpec.planned(_shape(dtype), "cpu", dtype, training=training)


def _measured(attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype, *, training: bool) -> int:
    """Peak beyond the inputs, the output and, in training, the gradients of the inputs."""
    *inputs, grad_output = (  # as the projections of a layer lie
        torch.randn(BATCH, TOKENS, HEADS, HEAD_DIM).to(dtype).transpose(1, 2) for _ in range(4)
    )
    if not training:
        return peak_memory(lambda: attend(*inputs)) - inputs[0].nbytes
    needing = [tensor.detach().requires_grad_() for tensor in inputs]
    peak = peak_memory(lambda: torch.autograd.grad(attend(*needing), needing, grad_output))
    return peak - 4 * inputs[0].nbytes


def _total(cost: AttentionCost) -> int:
    return cost.kept + cost.working


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upcast", [False, True])
def test_full_attention_is_that_of_diffusers(dtype: torch.dtype, training: bool, upcast: bool) -> None:
    layer = Attention(HEAD_DIM, heads=HEADS, dim_head=HEAD_DIM, upcast_attention=upcast, processor=AttnProcessor())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights: Tensor = layer.get_attention_scores(query[0], key[0])
        return (weights @ value[0])[None]

    cost = full_attention_cost(_call(dtype, training=training), upcast=upcast)
    assert _total(cost) == pytest.approx(_measured(attend, dtype, training=training), rel=0.05)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_attention_is_that_of_pytorch(dtype: torch.dtype, training: bool) -> None:
    cost = fused_attention_cost(_call(dtype, training=training))
    measured = _measured(F.scaled_dot_product_attention, dtype, training=training)
    assert _total(cost) == pytest.approx(measured, rel=0.05)
    assert cost.kept == (HEADS * TOKENS * 4 if training else 0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sliced_attention_is_that_of_its_plan(dtype: torch.dtype, training: bool) -> None:
    plan = plan_slices(_shape(dtype), 3 * 2**20, policy="exact", device_type="cpu", training=training)
    cost = planned_attention_cost(_call(dtype, training=training), plan)
    measured = _measured(
        lambda query, key, value: sliced_attention(query, key, value, plan=plan), dtype, training=training
    )
    assert plan.steps > 1
    assert cost == (0, plan.peak_bytes)
    assert _total(cost) == pytest.approx(measured, rel=0.05)
