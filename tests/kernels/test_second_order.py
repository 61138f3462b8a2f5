"""Second derivatives through every kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from slicemod import sliced_attention
from slicemod.kernels.native.build import native_library, native_obstacle
from slicemod.reference import reference_attention
from tests.oracle import layer_inputs


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


@pytest.mark.parametrize("kernel", ["auto", "native", "fused", "math"])
@pytest.mark.parametrize("sizes", [(64, 61, 16), (521, 509, 40)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_second_derivatives_are_those_of_exact_attention(
    kernel: str, sizes: tuple[int, int, int], is_causal: bool
) -> None:
    if kernel == "native" and native_library() is None:
        pytest.skip(f"no native kernel: {native_obstacle()}")
    inputs = layer_inputs(queries=sizes[0], keys=sizes[1], width=sizes[2], is_causal=is_causal).leaves()
    exact = inputs.leaves(torch.float64)
    second = []
    for these, attention in (
        (inputs, partial(sliced_attention, slicing={"kernel": kernel})),
        (exact, reference_attention),
    ):
        leaves = list(these.differentiable().values())
        first = torch.autograd.grad(these.run(attention).square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(torch.stack([grad.square().sum() for grad in first]).sum(), leaves))
    for found, wanted in zip(*second, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_torch_func_gives_the_gradients_of_exact_attention(kernel: str) -> None:
    query, key, value = torch.randn(3, 2, 5, 37, 11).double().unbind()

    def loss(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: attention(*inputs).square().sum()

    ours = torch.func.grad(loss(partial(sliced_attention, slicing={"kernel": kernel})), (0, 1, 2))(query, key, value)
    exact = torch.func.grad(loss(reference_attention), (0, 1, 2))(query, key, value)
    for found, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(found, wanted)
    output, pull_back, *_ = torch.func.vjp(partial(sliced_attention, slicing={"kernel": kernel}), query, key, value)
    for found, wanted in zip(pull_back(2 * output), exact, strict=True):
        torch.testing.assert_close(found, wanted)


def test_jacrev_through_the_sliced_kernel_is_that_of_exact_attention() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 3).double().unbind()
    mask = torch.randn(5, 5).double()

    def rows(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: attention(*inputs).sum(-1)

    sliced = partial(sliced_attention, slicing={"kernel": "math", "steps": 2})
    found = torch.func.jacrev(rows(sliced), (0, 1, 2, 3))(query, key, value, mask)
    exact = torch.func.jacrev(rows(reference_attention), (0, 1, 2, 3))(query, key, value, mask)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_derivative_by_torch_func_is_refused_in_words() -> None:
    query = torch.randn(1, 2, 5, 3)

    def loss(query: Tensor) -> Tensor:
        return sliced_attention(query, query, query, slicing={"kernel": "math"}).square().sum()

    with pytest.raises(NotImplementedError, match=r"torch\.func: expected at most a first derivative"):
        torch.func.grad(lambda query: torch.func.grad(loss)(query).sum())(query)
