from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slicemod.operator import operator


@operator("slicemod_tests::cube")
def cube(x: Tensor, factor: float) -> Tensor:
    return factor * x**3


@cube.register_fake
def _(x: Tensor, _factor: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return 3 * ctx.factor * grad * ctx.saved_tensors[0] ** 2, None


cube.register_autograd(_gradient, setup_context=_save)


def test_an_operator_computes_the_same_whether_or_not_something_looks_on() -> None:
    x = torch.randn(7, requires_grad=True)
    alone = cube(x, 1.5)
    with FlopCounterMode(display=False):
        watched = cube(x, 1.5)
    assert "slicemod_tests" in watched.grad_fn.name()
    assert "slicemod_tests" not in alone.grad_fn.name()
    for output in (alone, watched):
        torch.testing.assert_close(output, 1.5 * x**3)
        (gradient,) = torch.autograd.grad(output.sum(), x)
        torch.testing.assert_close(gradient, 4.5 * x.detach() ** 2)


def test_without_gradients_none_are_kept() -> None:
    x = torch.randn(7, requires_grad=True)
    with torch.no_grad():
        assert cube(x, 1.5).grad_fn is None


def test_tensors_without_memory_go_to_the_fake_function() -> None:
    assert cube(torch.empty(7, device="meta"), 1.5).device.type == "meta"


def test_second_derivatives_go_through_the_registered_gradients() -> None:
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: cube(x, 1.5), x)
