"""A layer that is computed again in the backward pass keeps its inputs, and gives the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from slicemod.adapters.diffusers import SlicemodAttnProcessor
from slicemod.attention import MemoryAwareCrossAttention
from slicemod.bench.memory import peak_memory
from tests.oracle import assert_same


def module(slicing: dict[str, Any], width: int = 12, dropout: float = 0.0) -> nn.Module:
    return MemoryAwareCrossAttention(width, heads=4, dim_head=width // 4, dropout=dropout, slicing=slicing)


def processed(slicing: dict[str, Any], width: int = 12, dropout: float = 0.0) -> nn.Module:
    processor = SlicemodAttnProcessor(slicing)
    layer: nn.Module = Attention(width, heads=4, dim_head=width // 4, dropout=dropout, processor=processor)
    return layer


every_layer = pytest.mark.parametrize("make", [module, processed])


def gradients(layer: Callable[..., Any], x: Tensor) -> list[Tensor]:
    parameters = layer.parameters() if isinstance(layer, nn.Module) else []
    torch.manual_seed(3)  # of the dropout
    leaf = x.detach().requires_grad_()
    return list(torch.autograd.grad(layer(leaf).square().sum(), [leaf, *parameters]))


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """What a call leaves for the backward pass beyond its output: so much more a second call needs beside it."""

    def twice() -> object:
        return layer(x), layer(x)

    layer(x)
    output: Tensor = layer(x)
    return peak_memory(twice) - peak_memory(lambda: layer(x)) - output.nbytes


@every_layer
@pytest.mark.parametrize("kernel", ["math", "auto"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_a_layer_that_keeps_all(make: Any, kernel: str, dropout: float) -> None:
    keeps = make({"kernel": kernel, "checkpoint": True}, dropout=dropout)
    again = make({"kernel": kernel, "checkpoint": "layer"}, dropout=dropout)
    again.load_state_dict(keeps.state_dict())
    x = torch.randn(2, 61, 12)
    assert_same(gradients(again, x), gradients(keeps, x))


@every_layer
def test_a_layer_keeps_nothing_but_its_inputs(make: Any) -> None:
    x = torch.randn(1, 1021, 48).requires_grad_()
    keeps, again = make({"checkpoint": True}, 48), make({"checkpoint": "layer"}, 48)
    assert kept_bytes(keeps, x) >= 4 * x.nbytes  # query, key, value and the output of the heads
    assert kept_bytes(again, x) < 0.1 * x.nbytes


@every_layer
def test_without_gradients_nothing_is_computed_again(make: Any) -> None:
    layer, calls = make({"checkpoint": "layer"}), []
    layer.to_q.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        layer(torch.randn(1, 7, 12))
    layer.requires_grad_(False)(torch.randn(1, 7, 12))
    assert len(calls) == 2


@every_layer
def test_a_compiled_layer_is_one_graph_with_the_same_gradients(make: Any) -> None:
    layer, x = make({"kernel": "math", "steps": 3, "checkpoint": "layer"}), torch.randn(2, 61, 12)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    assert_same(gradients(compiled, x), gradients(layer, x))


def test_the_plan_is_noted() -> None:
    layer = MemoryAwareCrossAttention(12, heads=4, dim_head=3, slicing={"steps": 3, "checkpoint": "layer"})
    layer(torch.randn(1, 61, 12))
    assert layer.plan is not None
    assert layer.plan.steps == 3
    assert layer.plan.checkpoint
