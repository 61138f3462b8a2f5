"""Half precision that a CPU does not multiply is computed in float32, in bounded memory and as exactly as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from slicemod.bench.memory import peak_memory
from slicemod.feed_forward.layer import SlicedFeedForward
from slicemod.on_cpu import widened
from slicemod.on_cpu.unfolded import is_small
from slicemod.on_cpu.widened import WidenedConv2d, WidenedLinear
from tests.feed_forward.test_plan import LAYERS
from tests.on_cpu.convolutions import (
    SHAPES,
    SIZES,
    assert_as_exact,
    assert_takes_what_it_says,
    convolution,
    image,
    shaped,
    sized,
)

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def prepared(module: Any) -> Any:
    """The module as `prepare_for_cpu` makes it on a CPU that does not multiply its dtype."""
    module.__class__ = WidenedConv2d if isinstance(module, nn.Conv2d) else WidenedLinear
    return module


def linear(channels: int, outputs: int, dtype: torch.dtype = torch.bfloat16, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(channels, outputs, bias=bias).to(dtype).requires_grad_(False)


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight, 16 KiB are widened at a time, and 7 rows of a product."""
    for name in ("_CONVOLUTION", "_SMALL_CONVOLUTION", "_PRODUCT"):
        monkeypatch.setattr(widened, name, 2**14)
    monkeypatch.setattr(widened, "_ROWS", 7)


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("unfolds", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_as_exact_as_plain(
    shape: tuple[Any, ...],
    dtype: torch.dtype,
    unfolds: bool,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conv = shaped(shape, dtype).to(memory_format=layout)
    x = image(2, shape[0], 13, 11, dtype=dtype).to(memory_format=layout)
    assert len(widened._chunks(conv.weight, widened._CONVOLUTION)) > 1 or shape[0] * shape[1] < 200
    plain = conv(x)
    monkeypatch.setattr(widened, "is_small", lambda weight, pixels: unfolds)
    assert_as_exact(prepared(conv)(x), plain, conv, x)


def assert_exact_to_rounding(layer: nn.Linear, x: Tensor) -> None:
    """The result has at most twice the error of the plain one's, or of the rounding of its elements."""
    wide = None if layer.bias is None else layer.bias.double()
    exact, plain = F.linear(x.double(), layer.weight.double(), wide), layer(x)
    found = prepared(layer)(x)
    assert found.shape == plain.shape
    assert found.dtype == x.dtype
    allowed = 2 * float((plain.double() - exact).norm()) + torch.finfo(x.dtype).eps / 2 * float(exact.norm())
    assert float((found.double() - exact).norm()) <= allowed


@pytest.mark.usefixtures("few_at_a_time")
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 19)),
    st.integers(1, 131),
    st.integers(1, 97),
    st.booleans(),
    st.sampled_from(HALF),
)
@settings(deadline=None, max_examples=40)
def test_any_linear_layer_is_as_exact_as_plain(
    tokens: tuple[int, int], channels: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    assert_exact_to_rounding(linear(channels, outputs, dtype, bias=bias), torch.randn(*tokens, channels).to(dtype))


def test_inputs_with_gaps_and_without_tokens_are_taken() -> None:
    assert_exact_to_rounding(linear(31, 17), torch.randn(2, 31, 5).bfloat16().transpose(1, 2))
    assert prepared(linear(31, 17))(torch.zeros(2, 0, 31).bfloat16()).shape == (2, 0, 17)
    assert prepared(linear(31, 17))(torch.zeros(31).bfloat16()).shape == (17,)


@pytest.mark.parametrize(("channels", "outputs"), [(509, 1531), (2039, 257)])
@pytest.mark.parametrize("tokens", [97, 1021])
def test_a_linear_layer_takes_no_more_than_it_says(channels: int, outputs: int, tokens: int) -> None:
    layer, x = prepared(linear(channels, outputs)), torch.randn(tokens, channels).bfloat16()
    taken = peak_memory(lambda: layer(x)) - 2 * tokens * outputs
    assert 0 < taken <= layer.scratch_bytes()
    if tokens > 256:
        assert layer.scratch_bytes() < 1.1 * taken
    assert taken <= layer.scratch_bytes(tokens) < 1.1 * taken
    assert layer.scratch_bytes() < 5 * 2**20


def test_a_convolution_holds_a_bounded_part_of_the_widened_weight() -> None:
    conv, x = prepared(convolution(channels=1021, outputs=1031)), image(1, 1021, 5, 7)
    taken = peak_memory(lambda: conv(x)) - 2 * 1031 * 5 * 7
    patches = 4 * 9 * 1021 * 5 * 7
    assert 4 * conv.weight.numel() > 2 * widened._SMALL_CONVOLUTION
    assert taken < widened._SMALL_CONVOLUTION + 1.2 * patches


@pytest.mark.parametrize("items", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_convolution_takes_what_it_says(sizes: tuple[int, ...], items: int) -> None:
    conv, x = sized(sizes, items, torch.bfloat16)
    assert_takes_what_it_says(prepared(conv), x)


@pytest.mark.parametrize(("channels", "outputs", "kernel"), [(509, 1021, 3), (1021, 509, 1), (1531, 31, 3)])
def test_a_convolution_takes_what_its_image_and_output_and_16_mib_do(channels: int, outputs: int, kernel: int) -> None:
    conv = prepared(convolution(channels=channels, outputs=outputs, kernel_size=kernel, padding=kernel // 2))
    for size in (7, 31):
        x = image(2, channels, size, size)
        taken = peak_memory(lambda: conv(x)) - 2 * 2 * outputs * size**2  # noqa: B023 - called at once
        wide = 4 * (channels + 2 * outputs) * size**2  # whose blocks are whole
        unfolded = kernel**2 if is_small(conv.weight, size**2) else 1
        assert taken <= 2**24 + wide + 4 * unfolded * channels * size**2 + 2**20


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("lora", [False, True])
def test_a_feed_forward_of_widened_products_keeps_to_its_plan(make: Any, lora: bool) -> None:
    whole = make()
    if lora:
        names = [name for name, module in whole.named_modules() if type(module) is nn.Linear]
        inject_adapter_in_model(LoraConfig(r=5, target_modules=names, init_lora_weights=False), whole)
    whole.to(torch.bfloat16)
    x = torch.randn(2, 331, 61).bfloat16()
    wanted = whole(x)
    for module in list(whole.modules()):
        if type(module) is nn.Linear:
            prepared(module)
    layer = SlicedFeedForward(whole.net, {"budget": "1.5MiB"})
    peak = peak_memory(lambda: layer(x)) - x.nbytes
    assert layer.plan is not None
    assert peak <= layer.plan.peak_bytes <= 1.5 * 2**20
    torch.testing.assert_close(layer(x), wanted, rtol=0.03, atol=0.01)


def test_a_graph_has_a_feed_forward_of_widened_products_as_one_operator() -> None:
    whole = LAYERS["geglu"]().to(torch.bfloat16)
    layer, x = SlicedFeedForward(whole.net, {"budget": "1.5MiB"}), torch.randn(2, 331, 61).bfloat16()
    wanted = layer(x)
    for module in list(layer.modules()):
        if type(module) is nn.Linear:
            prepared(module)
    operators: list[str] = []

    def recorded(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    found = torch.compile(layer, fullgraph=True, backend=recorded)(x)
    assert "slicemod.feed_forward.default" in operators
    assert operators.count("linear") == 0
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.01)


def test_what_is_more_than_inference_is_computed_as_before() -> None:
    layer, x = linear(31, 17), torch.randn(5, 31).bfloat16()
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x.float())
    prepared(layer).requires_grad_()
    with torch.enable_grad():
        assert torch.equal(layer(x), plain)
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()), half)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.float())
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), plain)
