"""Masks, their gradients, causal attention, shared keys and dropout by the native kernel are as exact as SDPA."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from slicemod.config import SliceConfig
from slicemod.functional import planned_attention, sliced_attention
from slicemod.kernels.native.build import native_library, native_obstacle
from tests.kernels.features import BLOCK_MASKS, MASKS, WIDTHS, block_mask, featured
from tests.kernels.native.dropped import dropout_factors
from tests.kernels.native.test_binding import KINDS, plain
from tests.kernels.native.test_operators import DTYPES, dtype, native, threads
from tests.kernels.with_dropout import assert_as_exact_as_what_is_left
from tests.oracle import Inputs, assert_as_exact_as_sdpa, layer_inputs, layer_like, results
from tests.pairwise import pairwise
from tests.test_functional import SPECIAL
from tests.test_memory_promise import promise_and_peak

pytestmark = pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}")

__all__ = ["dtype", "threads"]  # fixtures

SLICING = SliceConfig(kernel="native")
by_native = functools.partial(sliced_attention, slicing=SLICING)

# Of queries and keys: a part of a block, and more than one block of each.
SIZES = [(71, 131), (13, 73), (1, 77), (293, 523), (211, 29)]


@pytest.mark.parametrize(
    ("kind", "sizes", "widths", "key_heads"), pairwise(MASKS, SIZES, [*WIDTHS, (31, 300)], [None, 1]), ids=str
)
def test_any_two_features_together_are_as_exact_as_sdpa(
    dtype: torch.dtype, kind: str, sizes: tuple[int, int], widths: tuple[int, int], key_heads: int | None
) -> None:
    assert_as_exact_as_sdpa(by_native, featured(dtype, kind, sizes, widths, key_heads), ulps=2)


@pytest.mark.parametrize(
    ("threads", "kind", "key_heads"),
    pairwise([1, 2, 5], ["none", "gradient, shared by heads", "gradient, shared by rows", "causal"], [None, 1]),
    indirect=["threads"],
)
def test_threads_may_share_heads_of_any_kind(
    dtype: torch.dtype, kind: str, key_heads: int | None, threads: int
) -> None:
    assert_as_exact_as_sdpa(by_native, featured(dtype, kind, (523, 1531), (19, 19), key_heads))


@st.composite
def calls(draw: st.DrawFn) -> Inputs:
    torch.manual_seed(draw(st.integers(0, 99)))
    sizes = draw(st.integers(1, 150)), draw(st.integers(2, 300))
    widths = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    kind = draw(st.sampled_from(MASKS))
    inputs = featured(draw(st.sampled_from(DTYPES)), kind, sizes, widths, draw(st.sampled_from([None, 1])))
    if inputs.mask is not None and draw(st.booleans()):  # no number next to another
        needs_grad = inputs.mask.requires_grad
        inputs.mask = inputs.mask.detach().mT.contiguous().mT.requires_grad_(needs_grad)
    return inputs


@given(inputs=calls())
def test_any_call_is_as_exact_as_sdpa(inputs: Inputs) -> None:
    assert_as_exact_as_sdpa(by_native, inputs, ulps=4)


@pytest.mark.parametrize("kind", ["bool", "additive", "causal", "gradient, shared by items"])
@pytest.mark.parametrize("spread", [10.0, 100.0, 400.0])
def test_saturated_rows_have_gradients_as_exact_as_sdpa(dtype: torch.dtype, kind: str, spread: float) -> None:
    inputs = featured(dtype, kind, (131, 613), (40, 40), None)
    inputs.query, inputs.key = inputs.query * math.sqrt(spread), inputs.key * math.sqrt(spread)
    assert_as_exact_as_sdpa(by_native, inputs, ulps=4)


@pytest.mark.parametrize("hidden", [-math.inf, "least", -1e4])
def test_keys_that_are_hidden_first_or_in_whole_rows_weigh_what_sdpa_gives_them(
    dtype: torch.dtype, hidden: float | str
) -> None:
    number = torch.finfo(dtype).min if isinstance(hidden, str) else hidden
    mask = torch.zeros(71, 613)
    mask[:, :307] = number  # more than a block of keys
    mask[5:11] = number
    inputs = layer_inputs(dtype, queries=71, keys=613, mask=mask.to(dtype))
    assert_as_exact_as_sdpa(by_native, inputs)


@pytest.mark.parametrize("visible", [1, 29, 300, 1531])
@pytest.mark.parametrize("as_numbers", [False, True])
def test_padding_at_the_end_of_a_text_is_left_out(dtype: torch.dtype, visible: int, as_numbers: bool) -> None:
    seen = torch.zeros(2, 1, 1, 1531, dtype=torch.bool)
    seen[0, ..., :visible] = True
    seen[1, ..., :7] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf).to(dtype) if as_numbers else seen
    inputs = layer_inputs(dtype, queries=293, keys=1531, width=40, mask=mask)
    assert_as_exact_as_sdpa(by_native, inputs)


@pytest.mark.parametrize("name", BLOCK_MASKS)
@pytest.mark.parametrize("as_numbers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_blocks_that_a_mask_hides_are_left_out_and_nothing_else(
    dtype: torch.dtype, name: str, as_numbers: bool
) -> None:
    seen = block_mask(name, 653, 1531)
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf).to(dtype) if as_numbers else seen
    inputs = layer_inputs(dtype, queries=653, keys=1531, width=40, mask=mask)
    assert_as_exact_as_sdpa(by_native, inputs)


def test_a_number_that_is_none_is_not_hidden(dtype: torch.dtype) -> None:
    mask = torch.full((61, 613), -math.inf)
    mask[:, 7], mask[:, 601] = 0, math.nan
    inputs = layer_inputs(dtype, queries=61, keys=613, mask=mask.to(dtype))
    with torch.no_grad():
        assert inputs.run(by_native).isnan().all()


@pytest.mark.parametrize("as_numbers", [False, True])
def test_the_gradient_of_a_mask_is_zero_in_blocks_that_it_hides(dtype: torch.dtype, as_numbers: bool) -> None:
    mask = torch.randn(653, 1531).masked_fill(~block_mask("packed texts", 653, 1531), -math.inf).to(dtype)
    inputs = layer_inputs(dtype, queries=653, keys=1531, mask=mask.requires_grad_(as_numbers))
    assert_as_exact_as_sdpa(by_native, inputs, ulps=2)


def test_the_gradient_of_a_mask_that_is_expanded_along_the_queries_is_zero_at_padding(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype, queries=61, keys=1201)
    padding = torch.zeros(1, 1, 1, 1201).index_fill(3, torch.arange(101, 1201), -math.inf)
    row = torch.randn(1, 1, 1, 1201)
    inputs.mask = (row + padding).to(dtype).expand(2, 3, 61, 1201).requires_grad_()
    assert_as_exact_as_sdpa(by_native, inputs, ulps=2)
    found = results(by_native, inputs.leaves(), layer_like(2, 3, 61, 11, dtype))["mask"]
    assert float(found[..., 101:].abs().max()) == 0


def test_a_text_of_padding_alone_gives_zeros(dtype: torch.dtype) -> None:
    inputs = layer_inputs(dtype, mask=torch.zeros(2, 1, 1, 53, dtype=torch.bool))
    for result in results(by_native, inputs.leaves(), layer_like(2, 3, 61, 11, dtype)).values():
        assert not result.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_is_a_view_gives_what_its_numbers_give(kind: Any) -> None:
    inputs = layer_inputs(queries=31, keys=29, mask=kind((2, 3, 31, 29)))
    assert inputs.mask is not None
    same = Inputs(inputs.query, inputs.key, inputs.value, plain(inputs.mask))
    for _ in range(2):  # planned, and known from then on
        with torch.no_grad():
            assert torch.equal(inputs.run(by_native), same.run(by_native))


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_inf_go_where_sdpa_sends_them(dtype: torch.dtype, where: str, kind: str, special: str) -> None:
    inputs = layer_inputs(dtype, queries=31, keys=29)
    inputs.mask = torch.rand(31, 29) > 0.3 if kind == "bool" else torch.randn(31, 29).to(dtype)
    getattr(inputs, where)[1, 2, 7, 5] = SPECIAL[special]
    with sdpa_kernel(SDPBackend.MATH):
        theirs = inputs.run(F.scaled_dot_product_attention)
    ours = inputs.run(by_native)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize(("kind", "keys"), [("gradient", 131), ("gradient", 1)])
@pytest.mark.parametrize("name", ["query", "key", "value", "mask"])
def test_gradients_that_nobody_asked_for_are_left_out(kind: str, keys: int, name: str) -> None:
    inputs = featured(torch.float32, kind, (71, keys + 1), (11, 11), None)
    every = inputs.leaves()
    assert inputs.mask is not None
    inputs.mask = inputs.mask.detach()
    leaf = getattr(inputs, name).detach().requires_grad_()
    setattr(inputs, name, leaf)
    (grad,) = torch.autograd.grad(inputs.run(by_native).sum(), leaf)
    (wanted,) = torch.autograd.grad(every.run(by_native).sum(), getattr(every, name))
    assert torch.equal(grad, wanted)


# Dropout


@pytest.mark.parametrize("dropout_p", [0.05, 0.5])
def test_weights_are_dropped_with_the_probability_and_without_regard_to_others(dropout_p: float) -> None:
    factors = dropout_factors(2**62 + 12345, dropout_p, 7, 311, 523)
    kept = (factors > 0).double()
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    drawn = (kept - (1 - dropout_p)) / deviation  # of mean 0 and variance 1
    neighbours = {
        "alone": drawn,
        "keys": drawn[..., 1:] * drawn[..., :-1],
        "keys of other vectors": drawn[..., 16:] * drawn[..., :-16],
        "queries": drawn[:, 1:] * drawn[:, :-1],
        "heads": drawn[1:] * drawn[:-1],
        "seeds": drawn * (dropout_factors(2**62 + 12346, dropout_p, 7, 311, 523) > 0),
    }
    for name, product in neighbours.items():
        mean = float(product.mean()) * math.sqrt(product.numel())
        if name == "seeds":
            mean /= math.sqrt(1 - dropout_p)
        assert abs(mean) < 4, name
    for sums in (drawn.sum(1) / math.sqrt(311), drawn.sum(2) / math.sqrt(523)):
        assert abs(float(sums.square().mean()) - 1) < 6 * math.sqrt(2 / sums.numel())


@pytest.mark.parametrize(
    ("kind", "key_heads", "dropout_p"),
    pairwise(["none", "bool with dead rows", "gradient, shared by heads", "causal"], [None, 1], [0.1, 0.5]),
    ids=str,
)
def test_dropout_is_as_exact_as_what_it_leaves(
    dtype: torch.dtype, kind: str, key_heads: int | None, dropout_p: float
) -> None:
    assert_dropout_is_as_exact_as_what_it_leaves(dtype, kind, key_heads, dropout_p)


def assert_dropout_is_as_exact_as_what_it_leaves(
    dtype: torch.dtype, kind: str, key_heads: int | None, dropout_p: float
) -> None:
    inputs = featured(dtype, kind, (71, 613), (40, 40), key_heads)
    seed = torch.tensor(2**62 + 12345)
    factors = dropout_factors(int(seed), dropout_p, 4, 71, 613)
    ours = functools.partial(native, dropout_p=dropout_p, seed=seed)
    assert_as_exact_as_what_is_left(ours, inputs, factors, dropout_p)


def test_the_dropped_weights_do_not_depend_on_the_threads() -> None:
    inputs, found = layer_inputs(queries=1031, keys=523, width=19), []
    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        grad = torch.ones(2, 3, 1031, 19)
        found.append(results(functools.partial(native, dropout_p=0.3, seed=torch.tensor(5)), inputs.leaves(), grad))
    torch.set_num_threads(before)
    for name, result in found[0].items():
        torch.testing.assert_close(result, found[1][name], rtol=1e-5, atol=1e-5)


def test_all_weights_can_be_dropped(dtype: torch.dtype) -> None:
    assert not layer_inputs(dtype, queries=31, keys=29).run(by_native, dropout_p=1.0).any()


def test_each_call_draws_anew_and_a_checkpoint_draws_again_what_it_drew() -> None:
    inputs = layer_inputs(queries=31, keys=29).leaves()
    leaves = [inputs.query, inputs.key, inputs.value]
    torch.manual_seed(7)
    first, second = (inputs.run(by_native, dropout_p=0.3) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    again = checkpoint(by_native, *leaves, dropout_p=0.3, use_reentrant=False)
    assert torch.equal(again, first)
    for pair in zip(torch.autograd.grad(again.sum(), leaves), torch.autograd.grad(first.sum(), leaves), strict=True):
        assert torch.equal(*pair)


def test_dropout_without_a_seed_is_refused() -> None:
    inputs = layer_inputs()
    with pytest.raises(ValueError, match=r"seed: expected one int64, as dropout_p is 0\.3; got None"):
        inputs.run(native, dropout_p=0.3)


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 61, 52), torch.ones(61, 53).double()], ids=["sizes", "dtype"])
def test_a_mask_that_it_would_read_wrongly_is_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"mask: expected sizes of 1 or those of \(2, 3, 61, 53\), of .*; got"):
        layer_inputs(mask=mask).run(native)


# What it takes


@pytest.mark.parametrize(
    ("kind", "kind_of_number", "key_heads", "training", "dropout_p"),
    pairwise(
        ["bool", "gradient, shared by heads", "gradient, shared by rows", "causal"],
        DTYPES,
        [None, 1],
        [False, True],
        [0, 0.3],
    ),
    ids=str,
)
def test_the_peak_is_what_the_plan_says(
    kind: str, kind_of_number: torch.dtype, key_heads: int | None, training: bool, dropout_p: float
) -> None:
    inputs = featured(kind_of_number, kind, (521, 613), (40, 23), key_heads)
    promised, peak = promise_and_peak(inputs, SLICING, training=training, dropout_p=dropout_p)
    assert 0.99 * promised <= peak <= promised


@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
def test_auto_takes_it_with_masks_too(kind: str) -> None:
    inputs = featured(torch.bfloat16, kind, (521, 523), (40, 40), None)
    causal = kind == "causal"
    plan = planned_attention(inputs.query, inputs.key, inputs.value, inputs.mask, is_causal=causal)[1]
    assert plan is not None
    assert plan.kernel == "native"
