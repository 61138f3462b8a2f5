"""The sliced kernel's dropout and layouts; its exactness is tested through `sliced_attention`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slicemod.call import MaskShape, attention_shape, attention_sizes
from slicemod.functional import sliced_attention
from slicemod.kernels.outputs import empty_heads
from slicemod.kernels.sliced.loop import SlicedCall, math_backward, math_forward
from slicemod.reference import reference_attention
from tests.oracle import Inputs, error, layer_inputs, layer_like
from tests.pairwise import pairwise

KEYS = 53


def reads_weights(dtype: torch.dtype = torch.float32, **more: Any) -> Inputs:
    """Inputs whose output is their attention weights, as dropped: the value is the identity."""
    inputs = layer_inputs(dtype, keys=KEYS, **more)
    inputs.value = torch.eye(KEYS, dtype=dtype).expand(*inputs.key.shape[:2], KEYS, KEYS)
    return inputs


def dropped(inputs: Inputs, dropout_p: float, seed: int = 7, **slicing: Any) -> Tensor:
    torch.manual_seed(seed)
    return inputs.run(sliced_attention, dropout_p=dropout_p, slicing={"kernel": "math", "steps": 3} | slicing)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("key_heads", [None, 1])
def test_dropout_zeroes_its_share_of_weights_and_scales_the_others_up(key_heads: int | None, dropout_p: float) -> None:
    inputs = reads_weights(heads=6, key_heads=key_heads)
    weights, exact = dropped(inputs, dropout_p), inputs.run(reference_attention)
    zero = weights == 0
    deviation = math.sqrt(dropout_p * (1 - dropout_p) / weights.numel())
    assert abs(float(zero.double().mean()) - dropout_p) < 4 * deviation
    torch.testing.assert_close(weights[~zero].double(), exact[~zero] / (1 - dropout_p), rtol=1e-5, atol=1e-7)


def test_the_mean_over_many_draws_is_attention_without_dropout() -> None:
    inputs = layer_inputs(batch=1, queries=5, keys=7)
    draws = torch.stack([dropped(inputs, 0.3, seed) for seed in range(600)]).double()
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - inputs.run(reference_attention)).abs() < 5 * deviation).all()


def test_no_two_slices_heads_or_items_draw_alike() -> None:
    kept = dropped(reads_weights(heads=6, queries=60), 0.5, steps=3) != 0
    blocks = kept.reshape(2 * 6 * 3, 20 * KEYS)
    assert len({tuple(block.tolist()) for block in blocks}) == len(blocks)


def test_manual_seed_reproduces_the_draw() -> None:
    inputs = layer_inputs()
    assert torch.equal(dropped(inputs, 0.3, seed=1), dropped(inputs, 0.3, seed=1))
    assert not torch.equal(dropped(inputs, 0.3, seed=1), dropped(inputs, 0.3, seed=2))


def test_one_call_after_the_other_draws_anew() -> None:
    inputs = layer_inputs()
    first = dropped(inputs, 0.3)
    second = inputs.run(sliced_attention, dropout_p=0.3, slicing={"kernel": "math", "steps": 3})
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("dtype", "settings", "steps", "checkpoint"),
    pairwise(
        [torch.float32, torch.bfloat16, torch.float64],
        [{}, {"is_causal": True}, {"key_heads": 2}, {"mask": torch.randn(6, 61, KEYS)}],
        [1, 3, 1000],
        [True, False],
    ),
    ids=lambda value: str([*value]) if isinstance(value, dict) else str(value),
)
def test_backward_drops_what_forward_dropped(
    dtype: torch.dtype, settings: dict[str, Any], steps: int, checkpoint: bool
) -> None:
    settings = {name: value.to(dtype) if name == "mask" else value for name, value in settings.items()}
    inputs = layer_inputs(dtype, heads=6, keys=KEYS, **settings)
    if inputs.mask is not None:
        inputs.mask.requires_grad_()
    identity = torch.eye(KEYS, dtype=dtype).expand(*inputs.key.shape[:2], KEYS, KEYS)
    reading = Inputs(inputs.query, inputs.key, identity, inputs.mask, inputs.settings)
    factor = (dropped(reading, 0.3, steps=steps, checkpoint=checkpoint).detach() != 0).double() / 0.7

    leaves, doubles = inputs.leaves(), inputs.leaves(torch.float64)
    weights = Inputs(doubles.query, doubles.key, identity, doubles.mask, doubles.settings).run(reference_attention)
    value = doubles.value.repeat_interleave(6 // doubles.value.shape[1], 1)
    expected = (weights * factor) @ value
    output = dropped(leaves, 0.3, steps=steps, checkpoint=checkpoint)
    ulps = 4 * torch.finfo(dtype).eps
    assert error(output, expected) <= ulps * float(expected.detach().norm())
    grad_output = layer_like(2, 6, 61, 11, dtype)
    ours = torch.autograd.grad(output, [*leaves.differentiable().values()], grad_output)
    theirs = torch.autograd.grad(expected, [*doubles.differentiable().values()], grad_output.double())
    for grad, exact in zip(ours, theirs, strict=True):
        assert error(grad, exact) <= ulps * float(exact.norm())


@pytest.mark.parametrize("checkpoint", [True, False])
def test_gradients_under_dropout_are_those_of_finite_differences(checkpoint: bool) -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dropped(Inputs(query, key, value), 0.4, steps=2, checkpoint=checkpoint)

    tensors = [torch.randn(1, 2, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5)]
    assert torch.autograd.gradcheck(attention, tensors)


def test_dropping_everything_gives_zeros_and_zero_gradients() -> None:
    leaves = layer_inputs().leaves()
    output = dropped(leaves, 1.0)
    assert (output == 0).all()
    for grad in torch.autograd.grad(output.sum(), [*leaves.differentiable().values()]):
        assert (grad == 0).all()


def test_dropping_nothing_draws_nothing() -> None:
    inputs = layer_inputs()
    before = torch.get_rng_state()
    inputs.run(sliced_attention, dropout_p=0.0, slicing={"kernel": "math"})
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_applies_whenever_it_is_above_zero_as_in_sdpa() -> None:
    inputs = reads_weights()
    with torch.inference_mode():
        assert (dropped(inputs, 0.5) == 0).any()
        assert (inputs.run(F.scaled_dot_product_attention, dropout_p=0.5) == 0).any()


def test_the_kept_weights_are_those_before_dropout() -> None:
    inputs = layer_inputs(heads=6)
    call = SlicedCall(0.5, False, 11**-0.5, False, 6, 17, torch.tensor(3))
    output, kept = math_forward(inputs.query, inputs.key, inputs.value, None, call, keep_weights=True)
    torch.testing.assert_close(kept.double(), reads_weights_of(inputs), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(output.double(), kept.double() @ inputs.value.double())


def reads_weights_of(inputs: Inputs) -> Tensor:
    identity = torch.eye(KEYS).expand(*inputs.key.shape[:2], KEYS, KEYS)
    return reference_attention(inputs.query, inputs.key, identity)


def test_nothing_is_kept_unless_asked_for() -> None:
    inputs = layer_inputs()
    call = SlicedCall(0.0, False, 11**-0.5, False, 6, 17, None)
    assert math_forward(inputs.query, inputs.key, inputs.value, None, call, keep_weights=False)[1].numel() == 0


def test_inputs_are_left_as_they_were() -> None:
    mask = torch.randn(2, 3, 61, KEYS)
    inputs = layer_inputs(mask=mask).leaves()
    before = [tensor.detach().clone() for tensor in (inputs.query, inputs.key, inputs.value, mask)]
    dropped(inputs, 0.3).sum().backward()  # type: ignore[no-untyped-call]
    for tensor, copy in zip((inputs.query, inputs.key, inputs.value, mask), before, strict=True):
        assert torch.equal(tensor, copy)


def test_the_sizes_of_a_call_are_plain_and_complete() -> None:
    inputs = layer_inputs(torch.bfloat16, heads=6, key_heads=2)
    mask = torch.zeros(1, 6, 61, KEYS, dtype=torch.bool)
    sizes = attention_sizes(inputs.query, inputs.key, inputs.value, mask, dropout_p=0.1, is_causal=False, upcast=True)
    shape = attention_shape(sizes)
    assert (shape.batch, shape.heads, shape.queries, shape.keys, shape.head_dim) == (2, 6, 61, 53, 11)
    assert (shape.key_heads, shape.itemsize, shape.upcast, shape.dropout, shape.causal) == (2, 2, True, True, False)
    assert shape.mask == MaskShape(1, 6, 61, 53, is_bool=True, other_dtype=True, unaligned=True)


@pytest.mark.parametrize(
    ("layout", "irregular"),
    [
        (lambda tensor: tensor, False),
        (lambda tensor: tensor.contiguous(), False),
        (lambda tensor: tensor.mT.contiguous().mT, False),
        (lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2], True),
        (lambda tensor: tensor[..., :1].expand_as(tensor), True),
    ],
    ids=["layer", "contiguous", "column-major", "spaced", "one number"],
)
def test_only_strides_that_no_product_reads_are_gathered(layout: Any, irregular: bool) -> None:
    inputs = layer_inputs()
    settings: dict[str, Any] = {"dropout_p": 0.0, "is_causal": False, "upcast": False}
    for key, value in ((layout(inputs.key), inputs.value), (inputs.key, layout(inputs.value))):
        sizes = attention_sizes(inputs.query, key, value, None, **settings)
        assert attention_shape(sizes).irregular is irregular


def test_outputs_have_a_layers_strides() -> None:
    output = empty_heads(torch.empty(2, 3, 61, 11), 13)
    assert output.shape == (2, 3, 61, 13)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("items", [1, 2, 3])
@pytest.mark.parametrize("mask_sizes", [None, (3, 1, 1, 53), (1, 6, 61, 1)])
@pytest.mark.parametrize("key_heads", [2, 6])
def test_items_computed_together_give_the_same(items: int, mask_sizes: tuple[int, ...] | None, key_heads: int) -> None:
    inputs = layer_inputs(torch.float64, batch=3, heads=6, key_heads=key_heads)
    query, key, value = (tensor.detach().requires_grad_() for tensor in (inputs.query, inputs.key, inputs.value))
    mask = None if mask_sizes is None else torch.randn(mask_sizes, dtype=torch.float64, requires_grad=True)
    wanted = reference_attention(query, key, value, mask, enable_gqa=True, scale=0.3)
    leaves = [tensor for tensor in (query, key, value, mask) if tensor is not None]
    grad_output = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, leaves, grad_output)
    call = SlicedCall(0.0, False, 0.3, False, heads=18, rows=61, seed=None, items=items)
    with torch.no_grad():
        output, kept = math_forward(query, key, value, mask, call, keep_weights=True)
        torch.testing.assert_close(output, wanted)
        for weights in (kept, kept.new_empty(0)):  # read again, or computed again
            needs = (True, True, True, mask is not None)
            found = math_backward(grad_output, query, key, value, mask, weights, call, needs)
            for gradient, other in zip(found, expected, strict=False):
                torch.testing.assert_close(gradient, other)
