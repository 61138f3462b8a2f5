"""A layer in parts gives what the whole gives, in less memory, and where it may not be computed in parts it is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slicemod.adapters.diffusers import SlicemodAttnProcessor
from slicemod.attention import MemoryAwareCrossAttention
from slicemod.bench.memory import peak_memory
from slicemod.layers.heads import merge_heads, split_heads
from slicemod.layers.streaming import LEAST_TOKENS, plan_stream, projections_of
from tests.oracle import error
from tests.slow_cases import slow_if

TOKENS = 4099  # a prime, from which layers are computed in parts


def layer(
    context_dim: int | None = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> MemoryAwareCrossAttention:
    """Five heads, which halves do not divide, and an inner width that is not the layer's."""
    return MemoryAwareCrossAttention(13, context_dim, heads=5, dim_head=3, slicing=settings).to(dtype)


def by_sdpa(layer: MemoryAwareCrossAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """The layer as it is written around PyTorch's own attention."""
    context = x if context is None else context
    query, key, value = (
        split_heads(to(tokens), layer.heads)
        for to, tokens in ((layer.to_q, x), (layer.to_k, context), (layer.to_v, context))
    )
    output = F.scaled_dot_product_attention(query, key, value, scale=layer.scale)
    del query, key, value
    projected: Tensor = layer.to_out(merge_heads(output))
    return projected


def assert_as_exact_as_sdpas(layer: MemoryAwareCrossAttention, x: Tensor, context: Tensor | None = None) -> None:
    exact_layer = copy.deepcopy(layer).double()
    with torch.no_grad():
        exact = by_sdpa(exact_layer, x.double(), None if context is None else context.double())
        ours, theirs = layer(x, context), by_sdpa(layer, x, context)
    assert ours.dtype == x.dtype
    rounding = torch.finfo(torch.float64).eps * float(exact.norm())  # the oracle is no more exact in float64
    assert error(ours, exact) <= 2 * error(theirs, exact) + 4 * rounding


@pytest.mark.parametrize(
    "dtype",
    slow_if({torch.float16, torch.float64}.__contains__, [torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
@pytest.mark.parametrize("keys", [None, 2053])
def test_parts_are_as_exact_as_the_layer_on_sdpa(keys: int | None, dtype: torch.dtype) -> None:
    context = None if keys is None else torch.randn(2, keys, 11).to(dtype)
    assert_as_exact_as_sdpas(layer(None if keys is None else 11, dtype), torch.randn(2, TOKENS, 13).to(dtype), context)


@given(
    heads=st.integers(1, 7),
    width=st.integers(1, 5),
    batch=st.integers(1, 3),
    rows=st.integers(0, 5),
    same=st.booleans(),
)
def test_any_sizes_come_out_equal(heads: int, width: int, batch: int, rows: int, same: bool) -> None:
    channels = heads * width if same else 6
    ours = MemoryAwareCrossAttention(channels, 3, heads=heads, dim_head=width)
    x, context = torch.randn(batch, LEAST_TOKENS + rows, channels), torch.randn(batch, 2053, 3)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, context), by_sdpa(ours, x, context))


def test_tokens_that_are_laid_out_by_channels_come_out_equal() -> None:
    ours, x = layer(), torch.randn(2, 13, TOKENS).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), by_sdpa(ours, x))


def test_additional_tokens_are_removed_from_the_output() -> None:
    ours, x, more = layer(), torch.randn(1, TOKENS, 13), torch.randn(1, 3, 13)
    with torch.no_grad():
        whole = by_sdpa(ours, torch.cat([more, x], dim=1))
        torch.testing.assert_close(ours(x, additional_tokens=more), whole[:, 3:])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keys", [None, 2053])
def test_a_diffusers_layer_in_parts_is_that_of_its_own_processor(keys: int | None, bias: bool) -> None:
    ours = Attention(
        12, None if keys is None else 11, heads=3, dim_head=5, bias=bias, processor=SlicemodAttnProcessor()
    )
    theirs = copy.deepcopy(ours)
    theirs.set_processor(AttnProcessor2_0())
    x, context = torch.randn(2, TOKENS, 12), None if keys is None else torch.randn(2, keys, 11)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, context), theirs(x, context))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_a_layer_of_sd15_takes_three_quarters_of_what_it_takes_on_sdpa(dtype: torch.dtype) -> None:
    ours = MemoryAwareCrossAttention(320, heads=8, dim_head=40).to(dtype)
    x = torch.randn(1, 4096, 320).to(dtype)

    def peak(attention: Callable[..., Tensor]) -> int:
        with torch.no_grad():
            return peak_memory(lambda: attention(x))

    peak(ours)  # the first call compiles
    assert peak(ours) <= 0.75 * peak(lambda x: by_sdpa(ours, x))


def test_hooks_of_a_projection_see_its_whole_output() -> None:
    ours, seen = layer(), []
    ours.to_q.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        ours(torch.randn(1, TOKENS, 13))
    assert seen == [(1, TOKENS, 15)]


def test_an_adapter_around_a_projection_keeps_its_effect() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    ours, x = layer(), torch.randn(1, TOKENS, 13)
    doubled = Doubled(13, 15, bias=False)
    doubled.load_state_dict(ours.to_v.state_dict())
    with torch.no_grad():
        before = ours(x) - ours.to_out[0].bias
        ours.to_v = doubled
        torch.testing.assert_close(ours(x) - ours.to_out[0].bias, 2 * before)


def test_gradients_are_those_of_the_whole() -> None:
    ours, x = layer(), torch.randn(1, TOKENS, 13, requires_grad=True)
    grads = (
        torch.autograd.grad(call(x).square().sum(), [x, *ours.parameters()])
        for call in (ours, lambda x: by_sdpa(ours, x))
    )
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_context_gets_its_gradient_from_a_frozen_layer() -> None:
    ours = layer(11).requires_grad_(False)
    x, context = torch.randn(1, TOKENS, 13), torch.randn(1, 2053, 11, requires_grad=True)
    ours_grad, theirs = (
        torch.autograd.grad(call(x, context).square().sum(), context)[0]
        for call in (ours, lambda x, context: by_sdpa(ours, x, context))
    )
    torch.testing.assert_close(ours_grad, theirs, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_its_dtype() -> None:
    ours = layer()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(1, TOKENS, 13)).dtype == torch.bfloat16


@pytest.mark.parametrize("slicing", [{"kernel": "math"}, {"steps": 7}])
def test_slices_of_the_users_choice_are_those_of_the_whole_layer(slicing: dict[str, Any]) -> None:
    ours = layer(**slicing, budget="1GiB")
    with torch.no_grad():
        ours(torch.randn(1, TOKENS, 13))
    assert ours.plan is not None
    assert (ours.plan.kernel, ours.plan.steps * ours.plan.slice_size >= TOKENS) == ("math", True)


def test_dropped_outputs_are_not_computed_in_parts() -> None:
    ours, x = MemoryAwareCrossAttention(13, dropout=0.5), torch.zeros(1)
    with torch.no_grad():
        assert projections_of(ours.to_q, ours.to_k, ours.to_v, ours.to_out, x, x) is None
        ours.eval()
        assert projections_of(ours.to_q, ours.to_k, ours.to_v, ours.to_out, x, x) is not None


@pytest.mark.parametrize("dropout", [[], [nn.Dropout(0.0)]], ids=["alone", "and dropout"])
@pytest.mark.parametrize("kind", [nn.Sequential, lambda *parts: nn.ModuleList(parts)], ids=["sequence", "list"])
def test_an_output_projection_may_be_in_a_sequence_or_as_diffusers_in_a_list(
    kind: Callable[..., Any], dropout: list[nn.Module]
) -> None:
    ours, x = layer(), torch.zeros(1)
    with torch.no_grad():
        parts = projections_of(ours.to_q, ours.to_k, ours.to_v, kind(ours.to_out[0], *dropout), x, x)
    assert parts == (ours.to_q, ours.to_k, ours.to_v, ours.to_out[0])


def test_few_tokens_are_not_divided() -> None:
    assert plan_stream(8, LEAST_TOKENS - 1, LEAST_TOKENS - 1, "cpu") is None


def test_a_layer_of_few_keys_is_computed_as_a_whole() -> None:
    assert plan_stream(8, LEAST_TOKENS, 77, "cpu") is None
    assert plan_stream(8, LEAST_TOKENS, LEAST_TOKENS // 2, "cpu") is not None


def test_a_gpu_gets_only_parts_that_keep_it_busy() -> None:
    assert plan_stream(8, 4096, 4096, "cuda") is None
    assert plan_stream(8, 128**2, 128**2, "cuda") is None
    assert plan_stream(8, 256**2, 256**2, "cuda") == (8, 4, 256**2 // 2)
