"""A convolution of a small image is one product with the unfolded image: as exact, with less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slicemod import prepare_for_cpu
from slicemod.bench.memory import peak_memory
from slicemod.on_cpu import unfolded
from slicemod.on_cpu.convolution import Window
from slicemod.on_cpu.unfolded import UnfoldedConv2d, is_small
from slicemod.torch_internals import has_onednn
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

pytestmark = pytest.mark.skipif(not has_onednn, reason="PyTorch has no oneDNN here")


def prepared(conv: nn.Conv2d) -> nn.Conv2d:
    prepare_for_cpu(nn.Sequential(conv))
    assert isinstance(conv, UnfoldedConv2d)
    return conv


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_as_exact_as_plain(
    shape: tuple[Any, ...], bias: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, x = shaped(shape, torch.float32, bias=bias), image(2, shape[0], 19, 23, dtype=torch.float32)
    x = x.to(memory_format=layout)
    plain = conv(x)
    monkeypatch.setattr(unfolded, "is_small", lambda weight, pixels: True)
    assert_as_exact(prepared(conv)(x), plain, conv, x)


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_any_convolution_of_a_small_image_is_as_exact_as_plain(data: st.DataObject) -> None:
    draw = data.draw
    kernel, stride, padding, dilation = (
        (draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((1, 3), (1, 2), (0, 2), (1, 2))
    )
    conv = convolution(
        torch.float32,
        draw(st.integers(1, 37)),
        draw(st.integers(64, 131)),
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
    )
    x = image(
        draw(st.integers(1, 3)), conv.in_channels, *draw(st.tuples(*[st.integers(5, 8)] * 2)), dtype=torch.float32
    )
    plain = conv(x)
    assert Window.of(conv).output(x) == plain.shape[2:]
    assert_as_exact(prepared(conv)(x), plain, conv, x)


def test_a_larger_image_gives_the_very_bits_that_it_gave() -> None:
    conv, x = convolution(torch.float32), image(1, 37, 13, 11, dtype=torch.float32)
    assert not is_small(conv.weight, 13 * 11)
    plain = conv(x)
    assert torch.equal(prepared(conv)(x), plain)


def test_a_small_image_takes_less_memory_than_half_a_copy_of_the_weight() -> None:
    conv, x = convolution(torch.float32, 509, 521).eval(), image(2, 509, 13, 17, dtype=torch.float32)
    output = 4 * 2 * 521 * 13 * 17
    with torch.no_grad():
        conv(x)
        plain = peak_memory(lambda: conv(x)) - output
        prepared(conv)
        ours = peak_memory(lambda: conv(x)) - output
    assert plain > conv.weight.nbytes
    assert 0 < ours <= conv.weight.nbytes / 2


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "more"),
    [
        (61, 67, 5, {}),  # which PyTorch unfolds too
        (127, 131, 11, {"stride": 2}),
        (127, 257, 13, {"kernel_size": 1, "padding": 0, "stride": 2}),
        (3, 509, 80, {"kernel_size": 8, "padding": 0, "stride": 8}),
    ],
)
def test_no_call_takes_more_than_a_plain_one_and_a_copy_of_an_image(
    channels: int, outputs: int, size: int, more: dict[str, int]
) -> None:
    conv, x = convolution(torch.float32, channels, outputs, **more), image(2, channels, size, size, dtype=torch.float32)
    for images in (x, x[:1], x.to(memory_format=torch.channels_last)):
        conv(images)
        plain = peak_memory(lambda: conv(images))  # noqa: B023 - called at once
        with prepare_for_cpu(nn.Sequential(conv)):
            ours = peak_memory(lambda: conv(images))  # noqa: B023
        assert ours <= plain + 4 * channels * size**2


def test_one_pixel_of_a_kernel_needs_no_copy_of_the_image() -> None:
    conv, x = convolution(torch.float32, 131, 257, kernel_size=1, padding=0), image(1, 131, 11, 7, dtype=torch.float32)
    prepared(conv)
    assert peak_memory(lambda: conv(x)) == 4 * 257 * 11 * 7


@pytest.mark.parametrize("items", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_takes_what_it_says(sizes: tuple[int, ...], items: int) -> None:
    conv, x = sized(sizes, items, torch.float32)
    assert_takes_what_it_says(prepared(conv), x)


def test_gradients_are_those_of_the_plain_convolution() -> None:
    conv, x = convolution(torch.float32, outputs=211).requires_grad_(), image(1, 37, 7, 5, dtype=torch.float32)
    plain = torch.autograd.grad(conv(x).square().sum(), [*conv.parameters()])
    found = torch.autograd.grad(prepared(conv)(x).square().sum(), [*conv.parameters()])
    assert all(map(torch.equal, found, plain))


def test_a_compiled_model_computes_the_same() -> None:
    conv, x = convolution(torch.float32, outputs=211), image(1, 37, 7, 5, dtype=torch.float32)
    plain = conv(x)
    torch.testing.assert_close(torch.compile(prepared(conv), fullgraph=True, backend="eager")(x), plain)


def test_what_is_not_a_plain_call_is_computed_as_before() -> None:
    conv, x = convolution(torch.float32, outputs=211), image(1, 37, 7, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = conv(x)
    single, around = conv(x[0]), convolution(torch.float32, outputs=211, padding_mode="circular")
    around.load_state_dict(conv.state_dict())
    prepared(conv)
    assert torch.equal(conv(x[0]), single)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x), half)
    conv.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = around._reversed_padding_repeated_twice
    assert torch.equal(conv(x), around(x))


def test_a_forward_that_a_program_puts_into_the_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = prepared(convolution(torch.float32, outputs=211)), image(1, 37, 7, 5, dtype=torch.float32)
    own = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, given: own(self, given) + 1)
    assert torch.equal(conv(x), own(conv, x) + 1)
