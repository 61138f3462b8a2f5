"""sliced_attention is attention: exact whatever the slices, dtype, mask, strides and sizes."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slicemod.config import SliceConfig
from slicemod.functional import planned_attention, sliced_attention
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.memory.budget import AMPLE
from slicemod.plan import SlicePlan
from slicemod.reference import reference_attention
from tests.oracle import Attention, Inputs, assert_as_exact_as_sdpa, error, layer_inputs, layer_like
from tests.pairwise import pairwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SLICINGS: dict[str, dict[str, Any]] = {
    "auto": {"budget": "1GiB"},
    "one slice": {"steps": 1, "kernel": "math"},
    "uneven slices": {"steps": 3, "kernel": "math"},
    "single rows": {"steps": 1000, "kernel": "math"},
    "kept weights": {"steps": 5, "kernel": "math", "checkpoint": False},
    "upcast": {"steps": 5, "kernel": "math", "upcast": True},
}
BLOCKS = {  # batch x heads, rows, keys
    "heads": (2, 61, 0),
    "uneven heads": (4, 61, 0),
    "rows of single heads": (1, 17, 0),
    "key chunks": (1, 17, 7),
    "key chunks of heads": (4, 61, 23),
}
WAYS = [*SLICINGS, *BLOCKS]


def sliced(slicing: dict[str, Any] | None = None, **more: Any) -> Attention:
    return functools.partial(sliced_attention, slicing=slicing, **more)


def by(way: str, dtype: torch.dtype = torch.float32) -> Attention:
    """Attention in one of `WAYS`."""
    if way in SLICINGS:
        return sliced(SLICINGS[way])
    heads, rows, keys = BLOCKS[way]
    upcast = dtype.itemsize < 4
    return sliced(plan=SlicePlan("heads", 1, heads, AMPLE, "math", "test", heads, rows, upcast=upcast, keys=keys))


three_slices = by("uneven slices")


def masks(dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Masks for 2 batch items, 6 heads, 61 queries and 53 keys."""
    dead = torch.rand(2, 1, 61, 53) > 0.3
    dead[0, :, 4:7] = False
    return {
        "none": None,
        "bool": torch.rand(61, 53) > 0.3,
        "bool per key and item": torch.rand(2, 1, 1, 53) > 0.3,
        "bool per row": torch.ones(2, 6, 61, 1, dtype=torch.bool),
        "bool with dead rows": dead,
        "additive": torch.randn(2, 1, 61, 53).to(dtype),
        "additive per head, 3-D": torch.randn(6, 1, 53).to(dtype),
        "additive with dead rows": torch.zeros(2, 1, 61, 53).masked_fill(~dead, -math.inf).to(dtype),
        "additive with gradient": torch.randn(2, 6, 61, 53).to(dtype).requires_grad_(),
        "additive with gradient, shared by heads": torch.randn(2, 1, 61, 53).to(dtype).requires_grad_(),
        "additive with gradient, shared by all but keys": torch.randn(1, 53).to(dtype).requires_grad_(),
        "additive with gradient, per head": torch.randn(1, 6, 1, 53).to(dtype).requires_grad_(),
    }


@pytest.mark.parametrize(
    ("dtype", "kind", "way", "key_heads"), pairwise(DTYPES, masks(torch.float32), WAYS, [None, 2]), ids=str
)
def test_attention_is_as_exact_as_sdpa(dtype: torch.dtype, kind: str, way: str, key_heads: int | None) -> None:
    inputs = layer_inputs(dtype, heads=6, key_heads=key_heads, mask=masks(dtype)[kind])
    assert_as_exact_as_sdpa(by(way, dtype), inputs)


@pytest.mark.parametrize(
    ("dtype", "queries", "key_heads", "way"), pairwise(DTYPES, [31, 53, 61], [None, 2], WAYS), ids=str
)
def test_causal_attention_is_as_exact_as_sdpa(
    dtype: torch.dtype, queries: int, key_heads: int | None, way: str
) -> None:
    inputs = layer_inputs(dtype, heads=6, queries=queries, key_heads=key_heads, is_causal=True)
    assert_as_exact_as_sdpa(by(way, dtype), inputs)


@pytest.mark.parametrize(("heads", "rows"), [(1, 61), (2, 61), (3, 23), (4, 61), (5, 1), (6, 60), (12, 7)])
@pytest.mark.parametrize("key_heads", [None, 1, 2, 3])
def test_any_block_of_heads_and_rows_gives_the_same(key_heads: int | None, heads: int, rows: int) -> None:
    plan = SlicePlan("heads", 1, heads, AMPLE, "math", "test", heads, rows)
    inputs = layer_inputs(heads=6, key_heads=key_heads, mask=torch.randn(6, 61, 53).requires_grad_())
    assert_as_exact_as_sdpa(sliced(plan=plan), inputs)


@pytest.mark.parametrize("scale", [0.0, 0.03, 1.0, -0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_is_a_factor_of_the_scores(dtype: torch.dtype, scale: float) -> None:
    assert_as_exact_as_sdpa(three_slices, layer_inputs(dtype, scale=scale))


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_later_keys_stay_unseen_whatever_the_scale(dtype: torch.dtype, scale: float) -> None:
    inputs = layer_inputs(dtype, is_causal=True, scale=scale)
    expected = inputs.run(reference_attention)  # PyTorch's own has NaN here, its infinite scores times the scale
    assert error(inputs.run(sliced_attention), expected) < 8 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 5, 3), (2, 1, 5, 3)], ids=str)
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "gradient"])
def test_any_number_of_leading_dimensions(lead: tuple[int, ...], kind: str) -> None:
    query, key, value = (torch.randn(*lead, tokens, 11) for tokens in (61, 53, 53))
    mask = {"none": None, "bool": torch.rand(61, 53) > 0.3}.get(kind, torch.randn(*lead[-2:], 61, 53))
    if kind == "gradient" and mask is not None:
        mask.requires_grad_()
    assert_as_exact_as_sdpa(three_slices, Inputs(query, key, value, mask))
    assert_as_exact_as_sdpa(by("auto"), Inputs(query, key, value, mask))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_one_token_context_gives_query_and_key_no_gradient_at_all(dtype: torch.dtype, way: str) -> None:
    inputs = layer_inputs(dtype, heads=6, keys=1).leaves()
    output = inputs.run(by(way, dtype))
    assert torch.equal(output, inputs.value.expand_as(output))
    query, key, value = torch.autograd.grad(output, [inputs.query, inputs.key, inputs.value], torch.randn_like(output))
    assert (query == 0).all()
    assert (key == 0).all()
    assert (value != 0).all()


@pytest.mark.parametrize("sizes", [{"queries": 1}, {"keys": 2}, {"width": 1}, {"heads": 1, "batch": 1}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_sizes(dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    assert_as_exact_as_sdpa(three_slices, layer_inputs(dtype, **sizes), ulps=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_without_channels_see_all_keys_alike(dtype: torch.dtype) -> None:
    values = layer_like(2, 3, 53, 11, dtype).requires_grad_()
    output = sliced_attention(layer_like(2, 3, 61, 0, dtype), layer_like(2, 3, 53, 0, dtype), values)
    torch.testing.assert_close(output, values.mean(2, keepdim=True).expand_as(output))
    (found,) = torch.autograd.grad(output.sum(), values)
    torch.testing.assert_close(found, torch.full_like(values, 61 / 53))


@pytest.mark.parametrize("kernel", ["native", "fused", "math"])
def test_a_scale_that_is_a_tensor_is_what_it_holds_at_each_call(kernel: str) -> None:
    inputs, scale, slicing = layer_inputs(), torch.tensor(0.0), SliceConfig(kernel=kernel)
    if kernel == "native" and native_library() is None:
        pytest.skip(f"no native kernel: {native_obstacle()}")
    for number in (0.5, 2.0, 0.25):
        scale.fill_(number)
        expected = inputs.run(reference_attention, scale=number)
        torch.testing.assert_close(inputs.run(sliced_attention, scale=scale, slicing=slicing), expected.float())


def test_values_may_be_wider_than_queries() -> None:
    inputs = layer_inputs()
    for width in (1, 5, 29):
        wide = Inputs(inputs.query, inputs.key, layer_like(2, 3, 53, width))
        assert_as_exact_as_sdpa(three_slices, wide)


def strided(name: str, tensor: Tensor) -> Tensor:
    """The same numbers, or as many of them as the layout has, `(B, H, N, D)` in other strides."""
    layouts = {
        "contiguous": tensor.contiguous(),
        "column-major": tensor.mT.contiguous().mT,
        "head dim outermost": tensor.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "every second column": tensor.repeat_interleave(2, -1)[..., ::2],
        "every second row": tensor.repeat_interleave(2, -2)[..., ::2, :],
        "batch innermost": tensor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "one token for all": tensor[..., :1, :].expand_as(tensor),
        "one head for all": tensor[:, :1].expand_as(tensor),
        "one number for all": tensor[..., :1].expand_as(tensor),
        "at an offset": torch.cat([tensor, tensor], -1)[..., 3 : 3 + tensor.shape[-1]],
    }
    return layouts[name]


LAYOUTS = [
    "contiguous",
    "column-major",
    "head dim outermost",
    "every second column",
    "every second row",
    "batch innermost",
    "one token for all",
    "one head for all",
    "one number for all",
    "at an offset",
]


@pytest.mark.parametrize(
    ("dtype", "key_heads", "layout", "which", "way"),
    pairwise(
        [torch.float32, torch.bfloat16],
        [None, 3],
        LAYOUTS,
        ["query", "key", "value"],
        ["uneven slices", "rows of single heads", "key chunks", "auto"],
    ),
    ids=str,
)
def test_strides_do_not_matter(dtype: torch.dtype, key_heads: int | None, layout: str, which: str, way: str) -> None:
    inputs = layer_inputs(dtype, heads=6, key_heads=key_heads)
    setattr(inputs, which, strided(layout, getattr(inputs, which)))
    assert_as_exact_as_sdpa(by(way, dtype), inputs)


def test_strides_of_masks_and_of_the_incoming_gradient_do_not_matter() -> None:
    mask = torch.randn(53, 61, 6, 2).permute(3, 2, 1, 0).requires_grad_()
    assert_as_exact_as_sdpa(three_slices, layer_inputs(heads=6, mask=mask))
    inputs = layer_inputs().leaves()
    output = inputs.run(three_slices)
    leaves = list(inputs.differentiable().values())
    for grad in (torch.ones(1, 1, 1, 1).expand_as(output), torch.randn(11, 61, 3, 2).permute(3, 2, 1, 0)):
        given_grads = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        expected = torch.autograd.grad(output, leaves, grad.contiguous(), retain_graph=True)
        for one, other in zip(given_grads, expected, strict=True):
            assert torch.equal(one, other)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Inputs, SlicePlan]:
    """Small inputs of any kind, and any slices of them."""
    dtype = draw(st.sampled_from(DTYPES))
    key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, heads, queries, keys, width, value_width = (draw(st.integers(1, most)) for most in (3, 1, 40, 40, 12, 12))
    heads = key_heads * group
    torch.manual_seed(draw(st.integers(0, 10**6)))
    query = layer_like(batch, heads, queries, width, dtype)
    key, value = (
        layer_like(batch, key_heads, keys, width, dtype),
        layer_like(batch, key_heads, keys, value_width, dtype),
    )
    options: dict[str, Any] = {"enable_gqa": group > 1, "scale": draw(st.sampled_from([None, 0.25]))}
    kind = draw(st.sampled_from(["none", "causal", "bool", "additive", "gradient"]))
    mask = None
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        sizes = [draw(st.sampled_from([1, size])) for size in (batch, heads, queries)]
        mask = torch.rand(*sizes, keys) > 0.4 if kind == "bool" else torch.randn(*sizes, keys).to(dtype)
        mask.requires_grad_(kind == "gradient")
    slice_heads, rows = draw(st.integers(1, batch * heads)), draw(st.integers(1, queries))
    half, chunk = dtype.itemsize < 4, draw(st.integers(0, keys))
    plan = SlicePlan("heads", 1, 1, AMPLE, "math", "test", slice_heads, rows, draw(st.booleans()), half, keys=chunk)
    return Inputs(query, key, value, mask, options), plan


@given(calls())
def test_any_call_in_any_slices_is_as_exact_as_sdpa(call: tuple[Inputs, SlicePlan]) -> None:
    inputs, plan = call
    assert_as_exact_as_sdpa(sliced(plan=plan), inputs, ulps=8)


@pytest.mark.parametrize("kernel", ["math", "fused"])
def test_gradients_that_nobody_asked_for_are_left_out(kernel: str) -> None:
    inputs = layer_inputs()
    exact = inputs.leaves(torch.float64)
    for name in ("query", "key", "value"):
        alone = Inputs(inputs.query, inputs.key, inputs.value)
        leaf = getattr(inputs, name).detach().requires_grad_()
        setattr(alone, name, leaf)
        (grad,) = torch.autograd.grad(alone.run(sliced({"kernel": kernel})).sum(), leaf)
        (expected,) = torch.autograd.grad(exact.run(reference_attention).sum(), getattr(exact, name))
        assert error(grad, expected) <= 1e-5 * float(expected.norm() + 1)


# NaN and infinities. The comparison is with SDPA's math path, which computes softmax as it is written.

SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def assert_same_specials(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


# Only an additive mask holds such a number itself.
PLACES = [*itertools.product(["query", "key", "value"], ["none", "bool", "dead", "additive", "causal"])]
SLICED = ["one slice", "uneven slices", "single rows", "rows of single heads", "key chunks", "key chunks of heads"]


@pytest.mark.parametrize(
    ("place", "special", "way"), pairwise([*PLACES, ("mask", "additive")], SPECIAL, SLICED), ids=str
)
def test_nan_and_inf_go_where_sdpa_sends_them(place: tuple[str, str], special: str, way: str) -> None:
    where, masked = place
    inputs = layer_inputs(heads=6, is_causal=masked == "causal")
    if masked in ("bool", "dead"):
        inputs.mask = torch.rand(61, 53) > 0.3
        inputs.mask[7] = masked == "bool"
    elif masked == "additive":
        inputs.mask = torch.randn(61, 53)
    target: Any = inputs.mask if where == "mask" else getattr(inputs, where)[1, 3]
    target[7, 5] = SPECIAL[special]
    with sdpa_kernel(SDPBackend.MATH):
        theirs = inputs.run(F.scaled_dot_product_attention)
    assert not theirs.isfinite().all() or (where, special) == ("mask", "-inf")
    assert_same_specials(inputs.run(by(way)), theirs)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("where", ["query", "key", "value", "grad_output"])
@pytest.mark.parametrize("way", ["uneven slices", "key chunks"])
def test_nan_and_inf_go_where_sdpa_sends_them_in_gradients(way: str, where: str, special: str) -> None:
    inputs, grad_output = layer_inputs(), layer_like(2, 3, 61, 11)
    target = grad_output if where == "grad_output" else getattr(inputs, where)
    target[1, 2, 7, 5] = SPECIAL[special]
    both = []
    for attention in (F.scaled_dot_product_attention, by(way)):
        leaves = inputs.leaves()
        with sdpa_kernel(SDPBackend.MATH):
            output = leaves.run(attention)
            both.append(torch.autograd.grad(output, list(leaves.differentiable().values()), grad_output))
    for theirs, ours in zip(*both, strict=True):
        assert_same_specials(ours, theirs)


def test_large_scores_do_not_overflow() -> None:
    inputs = layer_inputs(torch.float16, width=64)
    inputs.query *= 60
    inputs.key *= 60
    assert_as_exact_as_sdpa(three_slices, inputs)


# Autocast, gradcheck, plans


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_casts_as_it_does_for_sdpa(dtype: torch.dtype, amp: torch.dtype) -> None:
    inputs = layer_inputs(dtype, mask=torch.randn(61, 53).to(dtype)).leaves()
    with torch.autocast("cpu", amp):
        theirs, ours = inputs.run(F.scaled_dot_product_attention), inputs.run(three_slices)
    assert ours.dtype == theirs.dtype == (dtype if dtype == torch.float64 else amp)
    seen = inputs.leaves(ours.dtype)
    exact = seen.run(reference_attention)
    assert error(ours, exact) <= 2 * error(theirs, exact) + 1e-15 * float(exact.detach().norm())
    (grad,) = torch.autograd.grad(ours.sum(), inputs.query)
    assert grad.dtype == dtype


def test_autocast_brings_mixed_dtypes_together_as_it_does_for_sdpa() -> None:
    inputs = layer_inputs()
    inputs.key = inputs.key.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = inputs.run(F.scaled_dot_product_attention), inputs.run(three_slices)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "checkpoint", "steps"),
    pairwise([{}, {"is_causal": True}, {"enable_gqa": True}, {"scale": 0.7}], [True, False], [1, 2]),
    ids=str,
)
def test_gradients_are_those_of_finite_differences(settings: dict[str, Any], checkpoint: bool, steps: int) -> None:
    key_heads = 1 if "enable_gqa" in settings else 2
    query = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 1, key_heads, 5, 2, dtype=torch.float64).requires_grad_().unbind()
    attention = sliced({"kernel": "math", "steps": steps, "checkpoint": checkpoint}, **settings)
    assert torch.autograd.gradcheck(attention, (query, key.detach().requires_grad_(), value.detach().requires_grad_()))


@pytest.mark.parametrize("sizes", [(3, 5), (2, 3, 5), (1, 2, 1, 5), (1, 1, 3, 1)], ids=str)
def test_the_gradient_of_a_mask_is_that_of_finite_differences(sizes: tuple[int, ...]) -> None:
    query, key, value = (torch.randn(1, 2, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    mask = torch.randn(sizes, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sliced({"kernel": "math", "steps": 2}), (query, key, value, mask))


@pytest.mark.parametrize("masked", [False, True])
def test_second_gradients_are_those_of_finite_differences(masked: bool) -> None:
    query, key, value = (torch.randn(1, 2, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    mask = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True),) if masked else ()
    assert torch.autograd.gradgradcheck(sliced({"kernel": "math", "steps": 2}), (query, key, value, *mask))


def test_the_plan_that_is_given_is_followed() -> None:
    inputs = layer_inputs()
    plan = SlicePlan("query", 9, 7, AMPLE, "math", "test", 6, 7)
    output, followed = planned_attention(inputs.query, inputs.key, inputs.value, plan=plan)
    assert followed is plan
    assert torch.equal(output, inputs.run(sliced({"steps": 9, "kernel": "math"})))


@pytest.mark.parametrize("settings", [{"kernel": "native"}, {"kernel": "auto"}, {"kernel": "math"}], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("negative", [False, True])
def test_the_default_device_changes_nothing(settings: dict[str, Any], training: bool, negative: bool) -> None:
    if settings["kernel"] == "native" and native_library() is None:
        pytest.skip(f"no native kernel: {native_obstacle()}")
    tensors = [layer_like(2, 3, tokens, 11) for tokens in (61, 53, 53)]
    if negative:  # such a view is copied before the native library reads it
        tensors[1] = torch.complex(tensors[1], -tensors[1]).conj().imag
    tensors = [tensor.detach().requires_grad_(training) for tensor in tensors]
    dropout_p = 0.3 if settings["kernel"] == "math" else 0.0

    def results() -> list[Tensor]:
        torch.manual_seed(7)
        query, key, value = tensors
        output = sliced_attention(query, key, value, dropout_p=dropout_p, slicing=settings)
        return [output, *(torch.autograd.grad(output, tensors, output.detach()) if training else ())]

    expected = results()
    with torch.device("meta"):
        for one, other in zip(results(), expected, strict=True):
            assert torch.equal(one, other)


def test_the_output_is_laid_out_for_a_layer_to_merge_its_heads_without_a_copy() -> None:
    output = layer_inputs().run(three_slices)
    assert output.transpose(1, 2).is_contiguous()
