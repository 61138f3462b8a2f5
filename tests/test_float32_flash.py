"""Flash attention of half precision, some heads at a time in float32: as exact as SDPA, within its plan."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slicemod.cpu_kernels import Float32Flash, float32_flash_plan
from slicemod.math_kernel import attention_shape, attention_sizes
from slicemod.plan import SlicePlan
from slicemod.slice_config import SliceConfig
from slicemod.sliced import sliced_attention
from tests.measured_peak import measured_peak
from tests.oracle import Attention, assert_as_exact_as_sdpa, layer_inputs

HALVES = [torch.bfloat16, torch.float16]


def by(heads: int) -> Attention:
    plan = SlicePlan("heads", 1, heads, 0, "fused", "test", heads, 61, upcast=True)
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
    promised = Float32Flash(attention_shape(sizes), heads, torch.get_num_threads()).peak(training=training)
    assert 0.9 * promised <= measured_peak(inputs, by(heads), training=training) <= promised


def test_a_budget_too_small_for_a_head_has_no_plan() -> None:
    inputs = layer_inputs(torch.float16)
    sizes = attention_sizes(inputs.query, inputs.key, inputs.value, None, dropout_p=0.0, is_causal=False, upcast=False)
    shape = attention_shape(sizes)
    settings: dict[str, Any] = {"policy": "exact", "training": True, "threads": 2}
    assert float32_flash_plan(shape, torch.float16, 1000, **settings) is None
    whole = float32_flash_plan(shape, torch.float16, 2**30, **settings)
    assert whole is not None
    fitting = float32_flash_plan(shape, torch.float16, whole.peak_bytes, **settings)
    assert fitting == whole


def test_second_derivatives_are_refused_in_words() -> None:
    inputs = layer_inputs(torch.float16).leaves()
    output = inputs.run(by(2))
    with pytest.raises(NotImplementedError, match=r'kernel="math"'):
        torch.autograd.grad(output.sum(), [inputs.query], create_graph=True)


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
    torch.library.opcheck(torch.ops.slicemod.float32_flash_backward, (grad, *plain, *kept, False, 0.3, 2))


def test_the_kernel_is_said_in_the_plan() -> None:
    assert str(SlicePlan("heads", 3, 2, 1000, "fused", "exact", 2, 61, upcast=True)).startswith("fused")
    assert str(SlicePlan("query", 3, 2, 1000, "native", "exact", 1, 2)).startswith("native")
    assert SliceConfig().kernel == "auto"
