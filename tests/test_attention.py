"""MemoryAwareCrossAttention is CompVis LDM's CrossAttention, with settings and a plan."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from einops import rearrange
from ldm.modules.attention import CrossAttention
from torch import Tensor

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.config import SliceConfig
from slicemod.functional import sliced_attention
from slicemod.memory.free_memory import PROBES, MemoryProbe
from slicemod.plan import NotEnoughMemoryError, SlicePlan

SLICINGS: dict[str, dict[str, Any]] = {
    "auto": {"budget": "1GiB"},
    "rows": {"kernel": "math", "steps": 7},
    "exact": {"kernel": "math", "budget": "120KiB", "policy": "exact"},
}
every_slicing = pytest.mark.parametrize("slicing", SLICINGS.values(), ids=SLICINGS.keys())


def pair(slicing: dict[str, Any], context_dim: int | None = 23) -> tuple[CrossAttention, MemoryAwareCrossAttention]:
    """The original and ours, with the same weights."""
    original = CrossAttention(29, context_dim, heads=3, dim_head=11)
    ours = MemoryAwareCrossAttention(29, context_dim, heads=3, dim_head=11, slicing=slicing)
    ours.load_state_dict(original.state_dict())
    return original, ours


def assert_same_layer(original: CrossAttention, ours: MemoryAwareCrossAttention, x: Tensor, *inputs: Any) -> None:
    """Outputs and gradients of inputs and parameters agree."""
    results = []
    for layer in (original, ours):
        leaf = x.detach().requires_grad_()
        output = layer(leaf, *inputs)
        grads = torch.autograd.grad(output.square().sum(), [leaf, *layer.parameters()])
        results.append([output, *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@every_slicing
def test_self_attention_is_that_of_the_original(slicing: dict[str, Any]) -> None:
    assert_same_layer(*pair(slicing, None), torch.randn(2, 61, 29))


@every_slicing
@pytest.mark.parametrize("keys", [1, 7, 53])
def test_cross_attention_is_that_of_the_original(keys: int, slicing: dict[str, Any]) -> None:
    assert_same_layer(*pair(slicing), torch.randn(2, 61, 29), torch.randn(2, keys, 23))


@every_slicing
@pytest.mark.parametrize("sizes", [(2, 53), (2, 1, 53)], ids=str)
def test_a_mask_of_keys_is_that_of_the_original(sizes: tuple[int, ...], slicing: dict[str, Any]) -> None:
    mask = torch.rand(sizes) > 0.4
    assert_same_layer(*pair(slicing), torch.randn(2, 61, 29), torch.randn(2, 53, 23), mask)


@every_slicing
def test_an_item_that_masks_all_its_keys_looks_at_all_alike_as_in_the_original(slicing: dict[str, Any]) -> None:
    mask = torch.rand(2, 53) > 0.4
    mask[1] = False
    original, ours = pair(slicing)
    x, context = torch.randn(2, 61, 29), torch.randn(2, 53, 23)
    assert_same_layer(original, ours, x, context, mask)
    mean = ours.to_out(ours.to_v(context[1]).mean(0))
    torch.testing.assert_close(ours(x, context, mask)[1], mean.expand(61, 29), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(61, 53), (2, 3, 61, 53), (2, 1, 1, 53)], ids=str)
def test_any_other_mask_is_that_of_sdpa_as_in_sgm(sizes: tuple[int, ...]) -> None:
    _, ours = pair(SLICINGS["rows"])
    x, context = torch.randn(2, 61, 29), torch.randn(2, 53, 23)
    mask = torch.randn(sizes)

    def split(tensor: Tensor) -> Tensor:
        return rearrange(tensor, "b n (h d) -> b h n d", h=3)

    query, key, value = split(ours.to_q(x)), split(ours.to_k(context)), split(ours.to_v(context))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    expected = ours.to_out(rearrange(expected, "b h n d -> b n (h d)"))
    torch.testing.assert_close(ours(x, context, mask), expected)


def test_a_mask_that_does_not_fit_is_an_error() -> None:
    _, ours = pair(SLICINGS["rows"])
    with pytest.raises(ValueError, match="attn_mask: expected a shape broadcastable"):
        ours(torch.randn(2, 61, 29), torch.randn(2, 53, 23), torch.ones(2, 52, dtype=torch.bool))


def test_parameters_are_named_and_shaped_as_in_the_original() -> None:
    original, ours = pair({})
    assert [(name, value.shape) for name, value in ours.state_dict().items()] == [
        (name, value.shape) for name, value in original.state_dict().items()
    ]
    assert list(ours.state_dict()) == [
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "to_out.0.weight",
        "to_out.0.bias",
    ]


def test_the_same_seed_makes_the_same_weights_as_the_original() -> None:
    torch.manual_seed(3)
    original = CrossAttention(29, 23, heads=3, dim_head=11)
    torch.manual_seed(3)
    ours = MemoryAwareCrossAttention(29, 23, heads=3, dim_head=11)
    for one, other in zip(original.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other)


def test_dropout_is_of_the_output_and_in_training_only() -> None:
    layer = MemoryAwareCrossAttention(29, heads=3, dim_head=11, dropout=0.5)
    x = torch.randn(2, 61, 29)
    share = float((layer(x) == 0).double().mean())
    assert abs(share - 0.5) < 0.05
    layer.eval()
    assert (layer(x) != 0).all()


@every_slicing
def test_additional_tokens_are_attended_to_and_cut_off(slicing: dict[str, Any]) -> None:
    _, ours = pair(slicing, None)
    x, tokens = torch.randn(2, 61, 29), torch.randn(2, 5, 29)
    output = ours(x, additional_tokens=tokens)
    assert output.shape == x.shape
    torch.testing.assert_close(output, ours(torch.cat([tokens, x], 1))[:, 5:])
    assert not torch.allclose(output, ours(x))


@every_slicing
def test_crossframe_items_share_key_and_value_of_the_first(slicing: dict[str, Any]) -> None:
    _, ours = pair(slicing, None)
    x = torch.randn(6, 61, 29)
    output = ours(x, n_times_crossframe_attn_in_self=3)
    for item in range(6):
        first = x[item // 3 * 3]
        torch.testing.assert_close(output[item], ours(x[None, item], first[None])[0], rtol=1e-4, atol=1e-5)


def test_crossframe_of_a_batch_that_does_not_divide_is_an_error() -> None:
    _, ours = pair({}, None)
    with pytest.raises(ValueError, match="n_times_crossframe_attn_in_self: expected a divisor of the batch, 5; got 3"):
        ours(torch.randn(5, 7, 29), n_times_crossframe_attn_in_self=3)


def test_repr_shows_settings_and_once_called_the_plan() -> None:
    layer = MemoryAwareCrossAttention(29, heads=3, dim_head=11, slicing={"kernel": "math", "steps": 7})
    assert "heads=3, dim_head=11, budget='auto', policy='exact', kernel='math', steps=7" in repr(layer)
    assert "plan:" not in repr(layer)
    layer(torch.randn(2, 61, 29))
    assert "plan: math, 7 x 9 rows," in repr(layer)


def plan_of(layer: MemoryAwareCrossAttention) -> SlicePlan | None:
    return layer.plan


def test_the_plan_is_that_of_the_last_call() -> None:
    layer = MemoryAwareCrossAttention(29, heads=3, dim_head=11, slicing={"kernel": "math", "steps": 7})
    assert plan_of(layer) is None
    for tokens in (61, 31):
        layer(torch.randn(2, tokens, 29))
        plan = plan_of(layer)
        assert plan is not None
        assert plan.rows == -(-tokens // 7)


def test_the_layer_asks_for_free_memory_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([10**6, 10**5])
    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(lambda device: next(answers)))
    layer = MemoryAwareCrossAttention(29, heads=3, dim_head=11, slicing={"kernel": "math", "policy": "exact"})
    steps = []
    for _ in range(2):
        layer(torch.randn(2, 61, 29))
        assert layer.plan is not None
        steps.append(layer.plan.steps)
    assert steps[0] < steps[1]


def test_a_budget_that_is_too_small_is_an_error() -> None:
    layer = MemoryAwareCrossAttention(29, heads=3, dim_head=11, slicing={"budget": 100, "policy": "exact"})
    with pytest.raises(NotEnoughMemoryError, match="has 100 bytes, for"):
        layer(torch.randn(2, 61, 29))


@pytest.mark.parametrize("slicing", [None, {"steps": 3}, SliceConfig(steps=3)], ids=["none", "dict", "config"])
def test_settings_come_in_any_form(slicing: Any) -> None:
    layer = MemoryAwareCrossAttention(29, slicing=slicing)
    assert layer.slicing == (SliceConfig() if slicing is None else SliceConfig(steps=3))


def test_settings_are_checked_when_the_layer_is_made() -> None:
    with pytest.raises(ValueError, match="policy: expected"):
        MemoryAwareCrossAttention(29, slicing={"policy": "greedy"})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_on_its_own(duplicate: Any) -> None:
    layer = MemoryAwareCrossAttention(29, heads=3, dim_head=11, slicing={"kernel": "math", "steps": 7})
    x = torch.randn(2, 61, 29)
    expected = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), expected)
    assert (other.slicing, other.plan) == (layer.slicing, layer.plan)
    with torch.no_grad():
        other.to_q.weight.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = MemoryAwareCrossAttention(29, heads=3, dim_head=11, slicing=SLICINGS["rows"])
    x = torch.randn(2, 61, 29)
    expected = layer(x)
    output = layer.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02)


def test_autocast_computes_in_its_dtype() -> None:
    layer = MemoryAwareCrossAttention(29, heads=3, dim_head=11, slicing=SLICINGS["rows"])
    x = torch.randn(2, 61, 29)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.02)


def test_the_function_is_what_the_layer_computes() -> None:
    layer = MemoryAwareCrossAttention(22, heads=2, dim_head=11, slicing=SLICINGS["rows"])
    x = torch.randn(2, 61, 22)
    query, key, value = (
        rearrange(projection(x), "b n (h d) -> b h n d", h=2) for projection in (layer.to_q, layer.to_k, layer.to_v)
    )
    output = sliced_attention(query, key, value, slicing=SLICINGS["rows"])
    assert torch.equal(layer(x), layer.to_out(rearrange(output, "b h n d -> b n (h d)")))
