"""Second derivatives through the sliced kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slicemod import sliced_attention


def _inputs(mask_grad: bool) -> list[Tensor]:
    query = torch.randn(1, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return [query, key, value, torch.randn(5, 7, dtype=torch.float64, requires_grad=mask_grad)]


@pytest.mark.parametrize("mask_grad", [False, True])
def test_gradgradcheck_passes(mask_grad: bool) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return sliced_attention(query, key, value, mask, enable_gqa=True, slicing={"kernel": "math", "steps": 3})

    assert torch.autograd.gradcheck(attend, _inputs(mask_grad))
    assert torch.autograd.gradgradcheck(attend, _inputs(mask_grad))


def test_causal_second_derivatives_are_those_of_the_masked_ones() -> None:
    query, key, value = (torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()

    def second(**how: object) -> tuple[Tensor, ...]:
        output = sliced_attention(query, key, value, slicing={"kernel": "math", "steps": 2}, **how)  # type: ignore[arg-type]
        first = torch.autograd.grad(output.square().sum(), query, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), (query, key, value))

    for found, wanted in zip(second(is_causal=True), second(attn_mask=mask), strict=True):
        torch.testing.assert_close(found, wanted)


def test_dropout_has_no_second_derivative_and_says_so() -> None:
    query = torch.randn(1, 1, 5, 3, requires_grad=True)
    output = sliced_attention(query, query, query, dropout_p=0.5, slicing={"kernel": "math"})
    with pytest.raises(NotImplementedError, match=r"dropout_p: expected 0"):
        torch.autograd.grad(output.sum(), query, create_graph=True)
