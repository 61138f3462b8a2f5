"""Attention on a CUDA device: as exact as SDPA there, and within what the plan promises."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.bench.memory import peak_memory
from slicemod.config import SliceConfig
from slicemod.functional import planned_attention, sliced_attention
from slicemod.kernels.retry import SmallerSlicesWarning
from slicemod.memory.budget import Budget
from slicemod.plan import NotEnoughMemoryError, SlicePlan
from tests.kernels.fused.asked import fused_obstacle
from tests.oracle import Inputs, assert_as_exact_as_sdpa, layer_inputs, layer_like
from tests.test_memory_promise import masks, promise_and_peak

pytestmark = pytest.mark.cuda

MIB = 2**20
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]
SLICINGS = {
    "auto": SliceConfig(),
    "rows": SliceConfig(kernel="math", steps=3),
    "heads": SliceConfig(kernel="math", policy="exact", budget="1MiB"),
    "key chunks": SliceConfig(kernel="math", policy="exact", budget="24KiB"),
    "kept weights": SliceConfig(kernel="math", steps=5, checkpoint=False),
    "upcast": SliceConfig(kernel="math", steps=5, upcast=True),
    "triton": SliceConfig(kernel="triton"),
}


@pytest.fixture(autouse=True)
def _on_cuda() -> Iterator[None]:
    """Tensors are made there, and the libraries have what they keep for good before anything is measured."""
    with torch.device("cuda"):
        warm = torch.ones(1, 64, 64, requires_grad=True)
        torch.autograd.backward(torch.bmm(warm, warm).sum())
        yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("slicing", SLICINGS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("mask", [*masks(torch.float32), "causal", "gqa"])
def test_output_and_gradients_are_as_exact_as_sdpas(slicing: str, dtype: torch.dtype, mask: str) -> None:
    sizes: dict[str, Any] = {"heads": 6, "queries": 131, "keys": 113}
    if mask == "causal":
        inputs = layer_inputs(dtype, **sizes, is_causal=True)
    elif mask == "gqa":
        inputs = layer_inputs(dtype, **sizes, key_heads=2)
    else:
        inputs = layer_inputs(dtype, **sizes, mask=masks(dtype)[mask])
    if slicing == "key chunks" and mask == "gradient":
        pytest.skip("its gradient alone is more than that budget")
    config = SLICINGS[slicing]
    assert_as_exact_as_sdpa(lambda *args, **kwargs: sliced_attention(*args, **kwargs, slicing=config), inputs)


@pytest.mark.parametrize("slicing", [name for name in SLICINGS if name != "auto"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("mask", ["no mask", "bool", "gradient", "causal"])
def test_the_peak_of_a_kernel_of_ours_is_what_the_plan_says(
    slicing: str, dtype: torch.dtype, mask: str, training: bool
) -> None:
    sizes: dict[str, Any] = {"heads": 6, "queries": 131, "keys": 113}
    if mask == "causal":
        inputs = layer_inputs(dtype, **sizes, is_causal=True)
    else:
        inputs = layer_inputs(dtype, **sizes, mask=masks(dtype)[mask])
    promised, peak = promise_and_peak(inputs, SLICINGS[slicing], training=training)
    assert 0.9 * promised <= peak <= promised


LAYERS = {  # batch, heads, queries, keys, head dim of Stable Diffusion's layers
    "sd15 64x64": (2, 8, 4096, 4096, 40),
    "sd15 32x32": (2, 8, 1024, 1024, 80),
    "sd15 8x8": (2, 8, 64, 64, 160),
    "sd15 text": (2, 8, 4096, 77, 40),
    "sdxl 64x64": (2, 10, 4096, 4096, 64),
    "sdxl 32x32": (1, 20, 1024, 1024, 64),
    "vae": (1, 1, 4096, 4096, 512),
    "odd width": (2, 5, 1009, 997, 11),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_layers_peak_is_within_its_plan(layer: str, dtype: torch.dtype, training: bool) -> None:
    batch, heads, queries, keys, width = LAYERS[layer]
    inputs = layer_inputs(dtype, batch=batch, heads=heads, queries=queries, keys=keys, width=width)
    promised, peak = promise_and_peak(inputs, SliceConfig(policy="exact"), training=training)
    assert peak <= promised


@pytest.mark.parametrize("budget", ["2MiB", "16MiB"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_layer_keeps_its_budget(budget: str, compiled: bool, training: bool) -> None:
    slicing = SliceConfig(budget=budget, policy="exact", kernel="math")
    query, key, value = (layer_like(2, 8, 4096, 40, torch.float16).requires_grad_(training) for _ in range(3))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sliced_attention(query, key, value, slicing=slicing)

    called = torch.compile(attend, fullgraph=True, dynamic=False) if compiled else attend
    grad_output = torch.ones_like(query.detach())

    def run() -> object:
        output = called(query, key, value)
        return (output, torch.autograd.grad(output, [query, key, value], grad_output)) if training else output

    with torch.set_grad_enabled(training):
        run()
        returned = query.nbytes * (4 if training else 1)
        assert peak_memory(run, "cuda") - returned <= Budget.parse(budget).bytes_on(torch.device("cuda"))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_no_kernel_of_pytorchs_takes_more_than_its_plan(
    layer: str, backend: SDPBackend, dtype: torch.dtype, training: bool
) -> None:
    batch, heads, queries, keys, width = LAYERS[layer]
    inputs = layer_inputs(dtype, batch=batch, heads=heads, queries=queries, keys=keys, width=width)
    with sdpa_kernel(backend):
        obstacle = fused_obstacle(inputs.query, inputs.key, inputs.value)
        if obstacle is not None:
            pytest.skip(obstacle)
        promised, peak = promise_and_peak(inputs, SliceConfig(kernel="fused"), training=training)
    assert peak <= promised


@pytest.mark.parametrize("kind", [torch.bool, torch.float16])
@pytest.mark.parametrize("keys", [77, 1024])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_mask_is_in_the_fused_plan(keys: int, kind: torch.dtype, training: bool) -> None:
    mask = (torch.rand(1, 1, 1024, keys) > 0.3).to(kind)
    inputs = layer_inputs(torch.float16, heads=8, queries=1024, keys=keys, width=40, mask=mask)
    promised, peak = promise_and_peak(inputs, SliceConfig(kernel="fused"), training=training)
    assert peak <= promised


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
@pytest.mark.parametrize("width", [40, 64, 80, 96, 128, 160])
def test_deterministic_algorithms_are_in_the_plan(width: int, backend: SDPBackend) -> None:
    inputs = layer_inputs(torch.float16, batch=1, heads=8, queries=1024, keys=1024, width=width)
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(backend):
            promised, peak = promise_and_peak(inputs, SliceConfig(kernel="fused"), training=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert 0.9 * promised <= peak <= promised


def test_a_gradient_of_a_mask_by_pytorchs_kernel_is_in_the_plan_and_exact() -> None:
    mask = torch.randn(1, 1, 1024, 1024, dtype=torch.float16).requires_grad_()
    inputs = layer_inputs(torch.float16, batch=1, heads=8, queries=1024, keys=1024, width=40, mask=mask)
    slicing = SliceConfig(kernel="fused")
    promised, peak = promise_and_peak(inputs, slicing, training=True)
    assert peak <= promised
    assert_as_exact_as_sdpa(lambda *args, **kwargs: sliced_attention(*args, **kwargs, slicing=slicing), inputs)


@pytest.mark.parametrize("width", [80, 160])
def test_widened_products_are_as_exact_as_sdpa(width: int) -> None:
    inputs = layer_inputs(torch.float16, batch=1, heads=8, queries=4096, keys=4096, width=width)
    plan = SliceConfig(kernel="math", budget="1GiB")
    promised, peak = promise_and_peak(inputs, plan, training=False)
    assert 0.9 * promised <= peak <= promised
    assert_as_exact_as_sdpa(lambda *args, **kwargs: sliced_attention(*args, **kwargs, slicing=plan), inputs)


@pytest.mark.parametrize("width", [16, 11])
def test_what_pytorch_cannot_fuse_is_left_to_kernels_of_ours_where_its_own_way_is_forbidden(width: int) -> None:
    inputs = layer_inputs(torch.float32, width=width)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for _ in range(2):
            assert plan_of(inputs).kernel in ("triton", "math")


def test_a_known_call_follows_pytorchs_settings() -> None:
    inputs = layer_inputs(torch.float16, width=16)
    for _ in range(2):
        assert plan_of(inputs).kernel == "fused"
    with sdpa_kernel(SDPBackend.MATH):
        assert plan_of(inputs).kernel in ("triton", "math")
    assert plan_of(inputs).kernel == "fused"


def plan_of(inputs: Inputs) -> SlicePlan:
    """The plan that a call follows."""
    plan = planned_attention(inputs.query, inputs.key, inputs.value)[1]
    assert plan is not None
    return plan


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_are_as_exact_as_sdpas(dtype: torch.dtype, scale: float) -> None:
    inputs = layer_inputs(dtype, heads=6, queries=131, keys=113, width=16)
    inputs.query = inputs.query * scale
    slicing = SliceConfig(kernel="math", steps=3)
    assert_as_exact_as_sdpa(lambda *args, **kwargs: sliced_attention(*args, **kwargs, slicing=slicing), inputs)


@pytest.mark.parametrize("dim_head", [16, 11])
def test_a_layer_compiles_whole_and_agrees(dim_head: int) -> None:
    layer = MemoryAwareCrossAttention(64, context_dim=48, heads=4, dim_head=dim_head)
    x, context = torch.randn(2, 256, 64), torch.randn(2, 77, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x, context), layer(x, context))


@pytest.mark.usefixtures("nothing_said")
def test_running_out_of_memory_ends_in_smaller_slices() -> None:
    query = layer_like(2, 8, 4096, 40, torch.float16)
    wanted = F.scaled_dot_product_attention(query, query, query)
    _, plan = planned_attention(query, query, query, slicing=SliceConfig(kernel="math", steps=1))
    assert plan is not None
    assert plan.peak_bytes > 256 * MIB
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 128 * MIB) / total)
    try:
        with pytest.warns(SmallerSlicesWarning, match="ran out of memory on cuda"):
            found = sliced_attention(query, query, query, plan=plan)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


def test_a_budget_too_small_is_refused() -> None:
    query = layer_like(2, 8, 4096, 40, torch.float16)
    with pytest.raises(NotEnoughMemoryError, match="bytes and has 512"):
        sliced_attention(query, query, query, slicing=SliceConfig(budget=512, policy="exact", kernel="math"))


@pytest.mark.parametrize("dropout_p", [0.3, 0.5])
def test_dropout_draws_the_same_in_the_backward_pass(dropout_p: float) -> None:
    inputs = layer_inputs(torch.float32, heads=3, queries=31, keys=29).leaves()
    value = inputs.value
    output = sliced_attention(
        inputs.query, inputs.key, value, dropout_p=dropout_p, slicing=SliceConfig(kernel="math", steps=3)
    )
    # The output is linear in the value: with the same draw, <grad, value> is <output, 1>.
    (grad,) = torch.autograd.grad(output.sum(), value)
    torch.testing.assert_close((grad * value).sum(), output.sum(), rtol=1e-4, atol=1e-3)


def test_autocast_is_that_of_sdpa() -> None:
    inputs: Inputs = layer_inputs()
    with torch.autocast("cuda", torch.float16):
        ours = inputs.run(sliced_attention)
        theirs = inputs.run(F.scaled_dot_product_attention)
    assert ours.dtype == theirs.dtype == torch.float16
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
