"""What sliced_attention is given: empty tensors, broadcasting, bad input, and transforms it has no answer to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from slicemod.call import AttentionShape
from slicemod.choose import plan_slices
from slicemod.functional import planned_attention, sliced_attention
from slicemod.plan import NotEnoughMemoryError
from tests.oracle import layer_inputs

MATH: dict[str, Any] = {"kernel": "math", "steps": 3}
GOOD: dict[str, Any] = {
    "query": torch.zeros(2, 6, 61, 11),
    "key": torch.zeros(2, 6, 53, 11),
    "value": torch.zeros(2, 6, 53, 13),
}


@pytest.mark.parametrize("slicing", [{}, MATH], ids=["auto", "math"])
@pytest.mark.parametrize(
    "sizes",
    [{"queries": 0}, {"keys": 0}, {"batch": 0}, {"width": 0}, {"queries": 0, "keys": 0}],
    ids=str,
)
def test_empty_tensors_give_what_sdpa_gives(sizes: dict[str, Any], slicing: dict[str, Any]) -> None:
    inputs = layer_inputs(**sizes)
    ours, theirs = inputs.leaves(), inputs.leaves()
    output, expected = ours.run(sliced_attention, slicing=slicing), theirs.run(F.scaled_dot_product_attention)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected, equal_nan=True)
    leaves = [ours.query, ours.key, ours.value]
    grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True, materialize_grads=True)
    expected_grads = torch.autograd.grad(
        expected.sum(), [theirs.query, theirs.key, theirs.value], allow_unused=True, materialize_grads=True
    )
    for grad, exact in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, exact, equal_nan=True)


@pytest.mark.parametrize("slicing", [{}, MATH], ids=["auto", "math"])
def test_no_heads_give_an_empty_output_and_empty_gradients(slicing: dict[str, Any]) -> None:
    inputs = layer_inputs(heads=0).leaves()  # SDPA itself ends the whole process here with PyTorch 2.9
    output = inputs.run(sliced_attention, slicing=slicing)
    assert output.shape == (2, 0, 61, 11)
    leaves = [inputs.query, inputs.key, inputs.value]
    grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True, materialize_grads=True)
    assert [grad.shape for grad in grads] == [(2, 0, 61, 11), (2, 0, 53, 11), (2, 0, 53, 11)]


def test_where_there_is_nothing_to_attend_to_there_is_no_plan() -> None:
    inputs = layer_inputs(keys=0)
    assert planned_attention(inputs.query, inputs.key, inputs.value)[1] is None


@pytest.mark.parametrize(
    "sizes", [(61, 53), (1, 53), (61, 1), (1, 1), (3, 61, 53), (2, 3, 1, 53), (1, 1, 61, 1)], ids=str
)
def test_masks_broadcast_as_in_sdpa(sizes: tuple[int, ...]) -> None:
    for mask in (torch.randn(sizes), torch.rand(sizes) > 0.3):
        inputs = layer_inputs(mask=mask)
        for slicing in (MATH, {}):
            expected = inputs.run(F.scaled_dot_product_attention)
            torch.testing.assert_close(inputs.run(sliced_attention, slicing=slicing), expected)


@pytest.mark.parametrize("lead", [(1, 3), (2, 1), (1, 1)], ids=str)
def test_key_and_value_broadcast_to_the_query_as_in_sdpa(lead: tuple[int, int]) -> None:
    inputs = layer_inputs()
    inputs.key = torch.randn(*lead, 53, 11)
    torch.testing.assert_close(inputs.run(sliced_attention, slicing=MATH), inputs.run(F.scaled_dot_product_attention))


@pytest.mark.parametrize(
    "sizes", [(61, 52), (60, 53), (5, 61, 53), (3, 6, 61, 53), (1, 2, 6, 61, 53), (2, 53)], ids=str
)
def test_a_mask_that_does_not_broadcast_is_named_with_both_shapes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        sliced_attention(**GOOD, attn_mask=torch.zeros(sizes))
    assert str(caught.value).startswith("attn_mask: expected a shape broadcastable to (2, 6, 61, 53)")
    assert f"got {sizes}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": torch.zeros(11)}, ["query: expected", "(11,)"]),
        ({"key": torch.zeros(53, 11)}, ["key: expected as many dimensions as query", "2 on"]),
        ({"value": torch.zeros(6, 53, 13)}, ["value: expected as many dimensions as query", "3 on"]),
        ({"key": torch.zeros(2, 6, 53, 12)}, ["key", "(2, 6, 53, 12)", "(2, 6, 61, 11)"]),
        ({"value": torch.zeros(2, 6, 52, 13)}, ["value", "(2, 6, 52, 13)", "(2, 6, 53, 11)"]),
        ({"key": GOOD["key"].double()}, ["key: expected", "torch.float64", "torch.float32"]),
        ({"value": GOOD["value"].half()}, ["value: expected", "torch.float16"]),
        ({"query": GOOD["query"].int()}, ["query: expected", "torch.int32"]),
        ({"key": GOOD["key"].to("meta")}, ["key: expected", "meta", "cpu"]),
        ({"value": GOOD["value"].to("meta")}, ["value: expected", "meta", "cpu"]),
        ({"key": torch.zeros(2, 5, 53, 11)}, ["key", "heads", "(2, 5, 53, 11)"]),
        ({"key": torch.zeros(3, 6, 53, 11)}, ["key", "batch", "(3, 6, 53, 11)"]),
        ({"value": torch.zeros(2, 2, 53, 13)}, ["value", "enable_gqa=True", "(2, 2, 53, 13)"]),
        (
            {"key": torch.zeros(2, 4, 53, 11), "value": torch.zeros(2, 4, 53, 13), "enable_gqa": True},
            ["key: expected a number of heads that divides query's 6", "got 4"],
        ),
        ({"dropout_p": -0.1}, ["dropout_p: expected a probability", "-0.1"]),
        ({"dropout_p": 1.1}, ["dropout_p: expected a probability", "1.1"]),
        ({"dropout_p": float("nan")}, ["dropout_p: expected a probability", "nan"]),
        ({"attn_mask": torch.zeros(61, 53), "is_causal": True}, ["is_causal", "attn_mask"]),
        ({"attn_mask": torch.zeros(61, 53, dtype=torch.int64)}, ["attn_mask: expected bool", "torch.int64"]),
        ({"attn_mask": torch.zeros(61, 53, dtype=torch.float64)}, ["attn_mask: expected", "torch.float64"]),
        ({"attn_mask": torch.zeros(61, 53, device="meta")}, ["attn_mask: expected", "meta"]),
    ],
)
@pytest.mark.parametrize("slicing", [MATH, {}], ids=["math", "auto"])
def test_bad_input_is_named_with_what_was_expected_and_what_came(
    slicing: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        sliced_attention(**(GOOD | changes), slicing=slicing)
    for word in words:
        assert word in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("exact", "exact: needs [0-9,]+ bytes and has 100"),
        ("heuristic", "Not enough memory"),
        ("mps", "the plan math, .* and has 100 bytes"),
    ],
)
def test_a_budget_that_is_too_small_is_an_error_of_memory(policy: str, words: str) -> None:
    with pytest.raises(NotEnoughMemoryError, match=words):
        sliced_attention(**GOOD, slicing={"budget": 100, "policy": policy})


def test_settings_are_checked_before_anything_is_computed() -> None:
    with pytest.raises(ValueError, match="got 'chunks'"):
        sliced_attention(**GOOD, slicing={"chunks": 3})


def test_sizes_can_be_worked_out_without_data() -> None:
    meta = {name: tensor.to("meta") for name, tensor in GOOD.items()}
    output = sliced_attention(**meta, slicing={"budget": "1GiB"})
    assert output.shape == F.scaled_dot_product_attention(**meta).shape == (2, 6, 61, 13)
    assert output.device.type == "meta"


def sliced(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sliced_attention(query, key, value, slicing=MATH)


# torch's own forward mode compiles its decompositions with torch.jit.script when it is first used.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@forward_mode
def test_forward_mode_differentiation_says_that_it_is_unsupported() -> None:
    query, key, value = torch.randn(3, 2, 3, 7, 5).unbind()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))  # type: ignore[no-untyped-call]
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            sliced(dual, key, value)


@forward_mode
def test_jvp_says_that_it_is_unsupported() -> None:
    query, key, value = torch.randn(3, 2, 3, 7, 5).unbind()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(lambda query: sliced(query, key, value), (query,), (torch.ones_like(query),))


def test_vmap_is_right() -> None:
    query, key, value = torch.randn(3, 4, 2, 3, 7, 5).unbind()
    output = torch.vmap(sliced)(query, key, value)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize(("plan", "slicing"), [(3, None), (plan_slices(AttentionShape(1, 1, 7, 7, 5, 4), 10**6), {})])
def test_a_plan_is_a_plan_and_stands_alone(plan: Any, slicing: Any) -> None:
    query = torch.randn(1, 1, 7, 5)
    with pytest.raises(ValueError, match="plan: expected a SlicePlan and no slicing beside it"):
        sliced_attention(query, query, query, plan=plan, slicing=slicing)
