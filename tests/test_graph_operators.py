"""Graphs whose plan is not a constant: a dynamic number of tokens, and attention that fits in no way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slicemod import MemoryAwareCrossAttention, NotEnoughMemoryError, sliced_attention
from slicemod.kernels.native.build import native_library
from slicemod.reference import reference_attention
from tests.oracle import layer_inputs
from tests.slow_cases import slow_if

KERNELS = ["auto", "math", "fused", *(["native"] if native_library() is not None else [])]


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_graph_that_is_compiled_for_any_size_computes_each_of_them(kernel: str) -> None:
    slicing: dict[str, Any] = {"budget": "4MiB", "kernel": kernel}

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return sliced_attention(query, key, value, scale=scale, slicing=slicing)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    for queries, keys, scale in ((61, 53, 0.3), (67, 53, 0.3), (61, 59, 0.7)):
        inputs = layer_inputs(queries=queries, keys=keys)
        found = compiled(inputs.query, inputs.key, inputs.value, scale)
        exact = inputs.run(reference_attention, scale=scale)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", slow_if({"math", "fused"}.__contains__, KERNELS))
def test_a_graph_that_is_compiled_for_any_size_has_gradients(kernel: str) -> None:
    layer = MemoryAwareCrossAttention(33, heads=3, dim_head=11, slicing={"budget": "64MiB", "kernel": kernel})
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (61, 67):
        x = torch.randn(2, tokens, 33, requires_grad=True)
        (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_dropout_in_a_graph_for_any_size_is_dropout(dropout_p: float) -> None:
    def attend(query: Tensor, dropout_p: float) -> Tensor:
        return sliced_attention(query, query, query, dropout_p=dropout_p)

    query = torch.ones(1, 2, 61, 11)
    found = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")(query, dropout_p)
    assert torch.allclose(found, query) is (dropout_p == 0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("masked", [False, True])
def test_an_exported_layer_with_a_dynamic_number_of_tokens_plans_when_it_runs(kernel: str, masked: bool) -> None:
    layer = MemoryAwareCrossAttention(33, heads=3, dim_head=11, slicing={"budget": "64MiB", "kernel": kernel}).eval()

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if masked else None
            out: Tensor = self.layer(x, mask=mask)
            return out

    module = Module()
    tokens = torch.export.Dim("tokens", min=3, max=4096)
    program = torch.export.export(module, (torch.randn(2, 67, 33),), dynamic_shapes={"x": {1: tokens}})
    assert "slicemod.attention_of_any_size" in str(program.graph)
    for count in (67, 97, 1031):
        x = torch.randn(2, count, 33)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [False, True])
def test_a_budget_that_is_too_small_is_an_error_of_its_type_under_a_compiler(backend: str, training: bool) -> None:
    layer = MemoryAwareCrossAttention(33, heads=3, dim_head=11, slicing={"budget": 100})
    x = torch.randn(2, 61, 33, requires_grad=training)
    with pytest.raises(NotEnoughMemoryError) as eager:
        layer(x)
    with pytest.raises(NotEnoughMemoryError) as compiled:
        torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert str(compiled.value).startswith(str(eager.value))  # PyTorch 2.9 adds where in the graph it was


def test_the_operators_are_registered_as_pytorch_wants_them() -> None:
    inputs = layer_inputs()
    settings = '{"budget": "1MiB"}'
    tensors = inputs.query, inputs.key, inputs.value
    torch.library.opcheck(torch.ops.slicemod.attention_of_any_size, (*tensors, None, 0.0, False, None, False, settings))
