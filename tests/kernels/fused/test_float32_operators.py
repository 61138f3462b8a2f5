"""Flash attention of half precision, some heads at a time in float32: as exact as SDPA, within its plan."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from slicemod.call import AttentionShape, CallSpec, attention_shape, attention_sizes
from slicemod.functional import sliced_attention
from slicemod.kernels.fused import float32_kernel, float32_operators
from slicemod.kernels.fused.float32_kernel import Float32FlashBytes, Float32FlashKernel
from slicemod.kernels.kernel import Terms
from slicemod.kernels.table_in_use import NO_TABLE
from slicemod.memory.budget import AMPLE
from slicemod.plan import SlicePlan
from slicemod.reference import reference_attention
from slicemod.torch_internals import cpu_flash_attention_operator
from tests.measured_peak import measured_peak
from tests.oracle import Attention, assert_as_exact_as_sdpa, layer_inputs

HALVES = [torch.bfloat16, torch.float16]


def by(heads: int) -> Attention:
    plan = SlicePlan("heads", 1, heads, AMPLE, "fused-float32", "test", heads, 61, upcast=True)
    return functools.partial(sliced_attention, plan=plan)


def masks(dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Masks for 2 batch items, 6 heads, 61 queries and 53 keys."""
    dead = torch.rand(2, 1, 61, 53) > 0.3
    dead[0, :, 4:7] = False
    return {
        "none": None,
        "bool": torch.rand(61, 53) > 0.3,
        "bool with dead rows": dead,
        "per head": torch.randn(1, 6, 1, 53).to(dtype),
        "additive": torch.randn(2, 6, 61, 53).to(dtype),
    }


@pytest.mark.parametrize("heads", [1, 2, 4, 6])
@pytest.mark.parametrize("mask", masks(torch.float32))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_it_is_as_exact_as_sdpa(dtype: torch.dtype, mask: str, heads: int) -> None:
    assert_as_exact_as_sdpa(by(heads), layer_inputs(dtype, heads=6, mask=masks(dtype)[mask]))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_causal_attention_is_as_exact_as_sdpa(dtype: torch.dtype) -> None:
    assert_as_exact_as_sdpa(by(2), layer_inputs(dtype, heads=6, is_causal=True))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("mask", [None, "bool", "per head"])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_the_peak_is_what_the_plan_says(heads: int, mask: str | None, training: bool) -> None:
    inputs = layer_inputs(torch.float16, heads=6, queries=509, keys=613, width=40)
    if mask == "bool":
        inputs.mask = torch.rand(509, 613) > 0.3
    elif mask is not None:
        inputs.mask = torch.randn(1, 6, 1, 613).half()
    sizes = attention_sizes(inputs.query, inputs.key, inputs.value, None, dropout_p=0.0, is_causal=False, upcast=False)
    if inputs.mask is not None:
        four = inputs.mask.reshape(*[1] * (4 - inputs.mask.dim()), *inputs.mask.shape)
        sizes = attention_sizes(
            inputs.query, inputs.key, inputs.value, four, dropout_p=0.0, is_causal=False, upcast=False
        )
    promised = Float32FlashBytes(attention_shape(sizes), heads, torch.get_num_threads()).peak(training=training)
    assert 0.9 * promised <= measured_peak(inputs, by(heads), training=training) <= promised


def call_of(shape: AttentionShape, dtype: torch.dtype, *, training: bool) -> CallSpec:
    return CallSpec(shape, dtype, torch.device("cpu"), training, threads=2)


def test_a_budget_too_small_for_a_head_has_no_plan() -> None:
    kernel = Float32FlashKernel()
    call = call_of(AttentionShape(2, 3, 61, 53, 11, 2), torch.float16, training=True)
    assert kernel.plan(call, 1000, Terms()) is None
    whole = kernel.plan(call, 2**30, Terms())
    assert whole is not None
    assert kernel.plan(call, whole.peak_bytes, Terms()) == whole


def test_bfloat16_is_converted_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_kernel, "cpu_products", lambda _dtype: None)
    shape, kernel = AttentionShape(1, 8, 4096, 4096, 40, 2), Float32FlashKernel()
    assert not kernel.pays_off(call_of(shape, torch.bfloat16, training=False), NO_TABLE)
    assert kernel.pays_off(call_of(shape, torch.bfloat16, training=True), NO_TABLE)
    assert kernel.pays_off(call_of(shape, torch.float16, training=False), NO_TABLE)


def test_a_cpu_with_instructions_for_a_dtype_needs_no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_kernel, "cpu_products", lambda _dtype: "float16")
    shape = AttentionShape(1, 8, 4096, 4096, 40, 2)
    assert not Float32FlashKernel().pays_off(call_of(shape, torch.float16, training=True), NO_TABLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_precision_is_refused(dtype: torch.dtype) -> None:
    obstacle = Float32FlashKernel().obstacle(call_of(AttentionShape(1, 2, 67, 53, 11, 4), dtype, training=False))
    assert obstacle is not None
    assert "half precision" in obstacle


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_second_derivatives_are_those_of_the_formula(mask: str) -> None:
    inputs = layer_inputs(torch.float16, heads=6, mask=masks(torch.float16)[mask]).leaves()
    exact = inputs.leaves(torch.float64)
    second = []
    for these, attention in ((inputs, by(2)), (exact, reference_attention)):
        first = torch.autograd.grad(these.run(attention).square().sum(), these.query, create_graph=True)[0]
        second.append(torch.autograd.grad(first.square().sum(), these.key)[0].double())
    torch.testing.assert_close(*second, rtol=2e-2, atol=2e-2 * float(second[1].abs().max()))


def test_under_autocast_it_stays_as_exact() -> None:
    inputs = layer_inputs(torch.float16)
    with torch.autocast("cpu", torch.float16):
        ours = inputs.run(by(2))
    assert torch.equal(ours, inputs.run(by(2)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("mask", ["none", "bool", "per head"])
def test_the_operators_are_registered_as_pytorch_wants_them(mask: str) -> None:
    inputs = layer_inputs(torch.float16, heads=6, mask=masks(torch.float16)[mask])
    four = None if inputs.mask is None else inputs.mask.reshape(*[1] * (4 - inputs.mask.dim()), *inputs.mask.shape)
    leaves = inputs.leaves()
    arguments = (leaves.query, leaves.key, leaves.value, four, False, 1 / math.sqrt(11), 2, True)
    torch.library.opcheck(torch.ops.slicemod.float32_flash, arguments)
    plain = (inputs.query, inputs.key, inputs.value, four)
    kept = torch.ops.slicemod.float32_flash(*plain, *arguments[4:])
    grad = torch.randn_like(kept[0])
    needs = [True, True, True, False]
    torch.library.opcheck(torch.ops.slicemod.float32_flash_backward, (grad, *plain, *kept, False, 0.3, 2, needs))


@pytest.mark.parametrize(("heads", "tokens", "steps"), [(7, 509, 6), (5, 1021, 6), (5, 61, 3)])
def test_its_plan_counts_the_turns_within_each_batch_item(
    heads: int, tokens: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = replace(CallSpec.planned(AttentionShape(3, heads, tokens, tokens, 40, 2), "cpu"), threads=1)
    plan = Float32FlashKernel().plan(call, 2**40, Terms())
    assert plan is not None
    turns = MagicMock(wraps=cpu_flash_attention_operator)
    monkeypatch.setattr(float32_operators, "cpu_flash_attention_operator", turns)
    query = torch.randn(3, heads, tokens, 40, dtype=torch.bfloat16)
    by(plan.heads)(query, query, query)
    assert plan.steps == steps == turns.call_count
