"""The oracle itself, against attention written out by hand and against PyTorch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slicemod.reference import reference_attention


def inputs(queries: int = 5, keys: int = 7, key_heads: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, 6, queries, 11, dtype=torch.float64)
    key, value = torch.randn(2, 2, key_heads, keys, 11, dtype=torch.float64).unbind()
    return query, key, value


def by_hand(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of one head, a number at a time."""
    output = torch.zeros(query.shape[0], value.shape[1], dtype=torch.float64)
    for row in range(query.shape[0]):
        scores = [scale * sum(float(a * b) for a, b in zip(query[row], other, strict=True)) for other in key]
        weights = [math.exp(score) for score in scores]
        for weight, values in zip(weights, value, strict=True):
            output[row] += weight / sum(weights) * values
    return output


@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_attention_written_out_by_hand(scale: float | None) -> None:
    query, key, value = inputs()
    output = reference_attention(query, key, value, scale=scale)
    for item in range(2):
        for head in range(6):
            factor = 11**-0.5 if scale is None else scale
            expected = by_hand(query[item, head], key[item, head], value[item, head], factor)
            torch.testing.assert_close(output[item, head], expected)


@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"scale": 0.2}], ids=str)
def test_it_is_sdpa_in_float64(settings: dict[str, Any]) -> None:
    query, key, value = inputs()
    expected = F.scaled_dot_product_attention(query, key, value, **settings)
    torch.testing.assert_close(reference_attention(query, key, value, **settings), expected)


@pytest.mark.parametrize("sizes", [(5, 7), (1, 7), (6, 5, 7), (2, 6, 5, 7), (2, 1, 1, 7)], ids=str)
@pytest.mark.parametrize("is_bool", [True, False])
def test_masks_are_those_of_sdpa(is_bool: bool, sizes: tuple[int, ...]) -> None:
    query, key, value = inputs()
    mask = torch.rand(sizes) > 0.4 if is_bool else torch.randn(sizes, dtype=torch.float64)
    if is_bool:
        mask[..., 3] = True
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(reference_attention(query, key, value, mask), expected)


@pytest.mark.parametrize("is_bool", [True, False])
def test_a_row_without_a_key_is_zero_and_has_zero_gradients(is_bool: bool) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in inputs())
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    if not is_bool:
        mask = torch.zeros(5, 7, dtype=torch.float64).masked_fill(~mask, -math.inf)
    output = reference_attention(query, key, value, mask)
    assert (output[:, :, 2] == 0).all()
    assert (output[:, :, [0, 1, 3, 4]] != 0).all()
    (grad,) = torch.autograd.grad(output.sum(), query)
    assert (grad[:, :, 2] == 0).all()
    assert (grad[:, :, 1] != 0).any()


def test_grouped_heads_are_repeated_in_place() -> None:
    query, key, value = inputs(key_heads=2)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(reference_attention(query, key, value, enable_gqa=True), expected)


def test_it_is_differentiable_twice() -> None:
    query, key, value = (tensor[:1, :2, :3, :3].detach().requires_grad_() for tensor in inputs())
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference_attention, (query, key, value, mask))
    assert torch.autograd.gradgradcheck(reference_attention, (query, key, value, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(torch.bfloat16) for tensor in inputs())
    assert reference_attention(query, key, value, dtype=dtype).dtype == dtype
    assert reference_attention(query, key, value).dtype == torch.float64
